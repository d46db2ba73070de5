"""GPT-2 without a framework: text generation, logits and scores for every checkpoint of the GPT-2 family.

    import gpt2rs
    model = gpt2rs.GPT2.from_pretrained("shakespeare")
    print(model.generate("ROMEO:", max_new_tokens=60).text)

Importing this loads NumPy and the compiled core, nothing else; tokenizers and hubs are loaded on first use.
"""

from ._core import Config, __version__
from .fidelity import Fidelity, compare
from .gpt2 import GPT2
from .results import Result, Score, Speculation
from .session import Session
from .settings import Settings
from .streaming import Stream

__all__ = [
    "GPT2",
    "Config",
    "Fidelity",
    "Result",
    "Score",
    "Session",
    "Settings",
    "Speculation",
    "Stream",
    "__version__",
    "compare",
]
