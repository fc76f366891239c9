"""How good a trained model is: bounds on the likelihood of given text, texts that it writes, questions that it answers.

Each kind is a `Job` of numbered parts that depend on nothing but their number, so that processes can share them and a killed
evaluation goes on (shares.py). `evaluate` does one kind at once, in Python.
"""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.evaluation.bounds import Evaluation, evaluate, unigram_entropy
    from esolm_megatron.evaluation.text_rows import TextRows
else:
    __getattr__ = hand_on(__name__, bounds="Evaluation evaluate unigram_entropy", text_rows="TextRows")
