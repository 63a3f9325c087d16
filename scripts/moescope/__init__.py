"""Where a Mixture-of-Experts language model keeps its knowledge, beside its dense partner."""

__version__ = "0.1.0"
