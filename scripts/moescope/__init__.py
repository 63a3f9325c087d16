"""Where a Mixture-of-Experts language model keeps its knowledge, beside its dense partner."""

import gc

# torch and transformers make a third of a million objects when they are imported, none of them garbage. Looking for
# some after every 700 new ones, as Python does, takes a seventh of that time.
gc.set_threshold(10_000)

__version__ = "0.1.0"
