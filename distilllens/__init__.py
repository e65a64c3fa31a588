"""DistillLens: distillation of language models through the logit lens."""

import logging

__version__ = "0.1.0"

# Where it is installed, peft imports it, and it would speak at once, and in each product later: so
# this comes before any other import.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
