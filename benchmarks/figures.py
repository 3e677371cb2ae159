"""The last lines of a benchmark: its figures, and whether they are what the project demands."""


def print_figures(figures: dict[str, float], must_show: dict[str, tuple[str, float]], *, compare: bool) -> None:
    """`must_show`: by key ">=" or "<=" and the bound; looked at where `compare`."""
    for key, value in figures.items():
        verdict = ""
        if compare and key in must_show:
            sign, bound = must_show[key]
            met = value >= bound if sign == ">=" else value <= bound
            verdict = f"   {sign} {bound:g} {'met' if met else 'MISSED'}"
        print(f"{key:<28}{value:>16,.3f}{verdict}")
