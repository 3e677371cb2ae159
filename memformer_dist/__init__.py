"""memformer_dist: distributed training of segment-recurrent memory transformers by exact memory replay back-propagation."""

__version__ = "0.1.0"
