"""The programs: one module each, which parses arguments and calls the functions that do the work.

`main(arguments)` raises UserError; `run()`, the console entry point, turns it into a message and an exit code.
"""
