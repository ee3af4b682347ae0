"""Mistakes in Python end in one sentence with the name and the value, whatever a public function was given."""

import jax
import jax.numpy as jnp
import pytest

import jax_entropy as je
from jax_entropy.census import census
from jax_entropy.config_file import load_config
from jax_entropy.errors import UserError, nearest
from jax_entropy.fields import FIELDS
from jax_entropy.report import watch
from jax_entropy.sweep import Sweep, product, zipped

X = jnp.zeros((1, 4, 2, 8))
ENTROPY, THRESHOLD, TOKENS = jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 3)), jnp.zeros((1, 4), int)
MODEL = je.architecture("SM+LN+G", num_layers=1, num_heads=1, model_dim=2, context_length=4, vocab_size=5)
SWEEP = Sweep(points=[{"architecture": "SM"}])


def init(model, tokens):
    return jax.eval_shape(model.init, jax.random.key(0), tokens)


def loss(tokens, **options):
    return je.loss_fn({}, tokens, model=je.Transformer(MODEL), **options)


CALLS = {
    "q=1 must be an array [B, T, N, H]": lambda: je.attention(1, 2, 3),
    "k=None must be an array [B, S, N, H]": lambda: je.attention(X, None, X),
    "v=int32[1,4,2,8] must be": lambda: je.attention(X, X, X.astype(int)),
    "q=float32[4,2,8] must be": lambda: je.attention(X[0], X, X),
    "temperature=2.0 must be an array [N, T]": lambda: je.attention(X, X, X, 2.0),
    "transform='tanh' must be a function": lambda: je.attention(X, X, X, transform="tanh"),
    "window='4' must be a whole number": lambda: je.attention(X, X, X, window="4"),
    "position=0.5 must be a whole number": lambda: je.attention(X, X, X, position=0.5),
    "num_slots=None must be a whole number": lambda: je.attention(X, X, X, num_slots=None),
    "attention implementation=['dense'] is not known": lambda: je.attention(X, X, X, implementation=["dense"]),
    "query=[] must be an array […, T, N, H]": lambda: je.attention_fn([], X, X),
    "4 heads of keys cannot be shared evenly by 2": lambda: je.attention_fn(X, X.reshape(1, 4, 4, 4), X),
    "context_length='4' must be a whole number": lambda: je.max_entropy("4"),
    "num_keys=8.5 must be a whole number": lambda: je.max_entropy(4, num_keys=8.5),
    "window=0 must be at least 1": lambda: je.max_entropy(4, window=0),
    "kind=None is not known": lambda: je.max_entropy(4, None),
    "weights='a' must be an array […, S]": lambda: je.row_entropy("a"),
    "entropy=float32[3] must be an array […, B, N, T]": lambda: je.head_entropy(jnp.zeros(3)),
    "entropy=None must be an array [L, N]": lambda: je.head_bands(None),
    "maximum='4' must be a number": lambda: je.head_bands(THRESHOLD, "4"),
    "maximum=float32[3] must be an array [L, 1] = [2, 1]": lambda: je.head_bands(THRESHOLD, THRESHOLD[0]),
    "context_length=True must be a whole number": lambda: je.max_entropy(True),
    "entropy=float32[2,3] must be an array [L, B, N, T]": lambda: je.entropy_penalty(THRESHOLD, 0, tolerance=0.2),
    "threshold=0.5 must be an array [L, N] = [2, 3]": lambda: je.entropy_penalty(ENTROPY, 0.5, tolerance=0.2),
    "tolerance='0' must be a number": lambda: je.entropy_penalty(ENTROPY, THRESHOLD, tolerance="0"),
    "model field norm=['layer'] is not known": lambda: je.architecture("SM", norm=["layer"]),
    "architecture 5: 5 is not understood": lambda: je.architecture(5),
    "config='SM' must be a ModelConfig": lambda: init(je.Transformer("SM"), TOKENS),
    "tokens=int32[4] must be an array [B, T]": lambda: init(je.Transformer(MODEL), TOKENS[0]),
    "tokens=float32[1,4] must be whole numbers": lambda: init(je.Transformer(MODEL), TOKENS * 1.0),
    "tokens=int32[4] must be an array [B, T+1]": lambda: loss(TOKENS[0]),
    "tokens=float32[1,4] must be whole numbers, like": lambda: loss(TOKENS * 1.0),
    "tokens=int32[1,1] must be an array [B, T+1] with": lambda: loss(TOKENS[:, :1]),
    "tokens hold the id 5, and the vocabulary ends at 4": lambda: loss(TOKENS + 5),
    "model='SM' must be a Transformer": lambda: je.loss_fn({}, TOKENS, model="SM"),
    "params=None must be a mapping": lambda: je.loss_fn(None, TOKENS, model=je.Transformer(MODEL)),
    "collections=3 must be a mapping": lambda: loss(TOKENS, collections=3),
    "teacher=3 must be a mapping": lambda: loss(TOKENS, teacher=3),
    "penalty_weight=-1.0 must not be negative": lambda: loss(TOKENS, penalty_weight=-1.0),
    "distillation=nan must be a finite number": lambda: loss(TOKENS, distillation=float("nan")),
    "tokens hold the id -1, and the vocabulary": lambda: loss(TOKENS - 1),
    "config='SM+LN' must be a ModelConfig": lambda: census("SM+LN"),
    "directory=None is no path": lambda: je.from_huggingface(None),
    "directory=5 is no path": lambda: je.from_safetensors(5),
    "config=None must be a ModelConfig": lambda: je.to_huggingface(None, {}, "out"),
    "variables={} must be a mapping with": lambda: je.to_huggingface(MODEL, {}, "out"),
    "variables=None must be a mapping with": lambda: je.to_safetensors(MODEL, None, "out"),
    "directory=b'out' is no path": lambda: je.to_safetensors(MODEL, {"params": {}}, b"out"),
    "directory=[] is no path": lambda: je.inspect([]),
    "workdir=None is no path": lambda: je.load_run(None),
    "workdir=5 is no path": lambda: je.report(5),
    "port='8008' must be a whole number": lambda: watch("run", port="8008"),
    "figures=['png'] is not known": lambda: je.report("run", figures=["png"]),
    "to={} is not known": lambda: je.export_run("run", "out", {}),
    "section=5 must be the data section": lambda: je.evaluate("run", section=5),
    "prompt=None must be text": lambda: je.generate("run", None),
    "config={} must be a ConfigDict": lambda: je.train({}, "run"),
    "config=5 must be a file": lambda: load_config(5),
    "values=['seed'] must be a mapping": lambda: load_config("quickstart", ["seed"]),
    "config.train.num_steps=many must be a whole": lambda: load_config("quickstart", {"train.num_steps": "many"}),
    "what=5 is no path": lambda: je.sweep(5, "sweep"),
    "scale=['small'] is not known": lambda: je.sweep("table2", "sweep", scale=["small"]),
    "fields=['seed'] must be a mapping": lambda: je.sweep(SWEEP, "sweep", fields=["seed"]),
    "jobs='2' must be a whole number": lambda: je.sweep(SWEEP, "sweep", jobs="2"),
    "fields=5 must be a mapping": lambda: product(5),
    "fields=None must be a mapping": lambda: zipped(None),
}


@pytest.mark.parametrize("sentence", CALLS)
def test_a_wrong_argument_ends_in_a_sentence(sentence):
    with pytest.raises(UserError) as caught:
        CALLS[sentence]()
    said = str(caught.value)
    assert said.startswith(sentence) and "\n" not in said and len(said) < 300


def test_fields_are_given_as_text_or_as_they_are():
    as_text = load_config("quickstart", {"train.num_steps": "7", "model.bias": "all", "train.wandb": "true"})
    assert load_config("quickstart", {"train.num_steps": 7, "model.bias": "all", "train.wandb": True}) == as_text


@pytest.mark.parametrize("said, meant", [
    ("lr", "optimizer.learning_rate"), ("steps", "train.num_steps"), ("batch", "train.batch_size"),
    ("optimiser.lerning_rate", "optimizer.learning_rate"), ("num_head", "model.num_heads"), ("corpus", None),
    ("banana", None), ("x", None), ("verbose", None),
])  # fmt: skip
def test_the_nearest_choice_is_proposed_where_one_is_near(said, meant):
    proposed = nearest(said, [field.name for field in FIELDS])
    if meant:
        assert proposed == f"; did you mean {meant!r}?"
    else:
        assert proposed.startswith("; choose one of ") and proposed.endswith(f" or {len(FIELDS) - 5} others")
    assert nearest(said, ["png", "svg"]) == "; choose one of 'png', 'svg'"
