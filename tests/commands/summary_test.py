"""What a person sees when training ends."""

from jax_entropy.commands.summary import samples
from jax_entropy.model import Transformer
from jax_entropy.runs.load import Run
from tests.generate_test import Letters
from tests.tiny_model import initial, tiny


def test_samples_fill_a_context_that_is_as_short_as_may_be():
    config = tiny("SM", context_length=4)
    run = Run(None, None, Transformer(config), initial(config), Letters(), 0)
    assert [len(text) <= 1 for text in samples(run, "The")] == [True] * 3
    assert samples(run, "Then") == samples(run, "The end") == []  # no room for a token
