"""Files of sweeps: those that come along load at every scale, and every mistake is one sentence and exit code 2."""

import pytest

from jax_entropy.commands.main import main
from jax_entropy.config_file import bundled
from jax_entropy.errors import UserError
from jax_entropy.sweep import SCALES, Sweep, Tuning, product, zipped
from jax_entropy.sweep.queue import Place, places
from jax_entropy.sweep.spec import load_sweep, points_of


def test_lists_of_points():
    assert product({"a": [1, 2], "b": ["x", "y"]}) == [dict(a=a, b=b) for a in (1, 2) for b in "xy"]
    assert zipped({"a": [1, 2], "b": ["x", "y"]}) == [dict(a=1, b="x"), dict(a=2, b="y")]
    with pytest.raises(UserError, match="as many values each: a 2, b 1"):
        zipped({"a": [1, 2], "b": ["x"]})
    for make in (product, zipped):
        with pytest.raises(UserError, match="architecture='SM' must be a list of values"):
            make({"architecture": "SM"})


def test_there_is_a_sweep_for_each_table_and_figure():
    assert {f"table{i}" for i in range(2, 9)} | {f"figure{i}" for i in (2, 3, 5, 6, 7, 8)} <= set(bundled("sweeps"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", bundled("sweeps"))
def test_bundled_sweeps_are_whole_at_every_scale(name, scale, tmp_path):
    sweep = load_sweep(name, scale)
    points = points_of(sweep, {"data.files": str(tmp_path)})
    folders = {point.run(tmp_path, seed).path for point in points for seed in sweep.seeds}
    assert len(folders) == len(points) * len(sweep.seeds) and sweep.baselines and sweep.title
    assert all(len(path.name) < 200 and path.parent == tmp_path for path in folders)
    assert all(point.config.data.files == str(tmp_path) for point in points)


def test_what_a_point_sets_wins_over_the_command_and_that_over_the_sweep():
    sweep = Sweep(
        tuning=Tuning(),
        points=[{"train.keep": 5}],
        fields={"train.keep": 1, "train.num_steps": 1, "data.num_threads": 9},
    )
    (point,) = points_of(sweep, {"train.keep": "3", "train.num_steps": "3"})
    assert (point.config.train.keep, point.config.train.num_steps, point.config.data.num_threads) == (5, 3, 9)
    assert point.label == "EReg(SM(t)+ScFuFFN), keep=5" and point.tuned
    (point,) = points_of(sweep, {"optimizer.learning_rate": "0.02"})
    assert point.config.optimizer.learning_rate == 0.02 and not point.tuned


def test_a_long_label_is_a_short_folder_of_its_own(tmp_path):
    sweep = Sweep(points=product({"data.files": ["x" * 150 + end for end in "ab"]}), fields={"data.source": "files"})
    first, second = (point.run(tmp_path, 1).path for point in points_of(sweep, {}))
    assert first != second and len(first.name) < 150


def test_every_run_has_a_folder_of_its_own_whatever_its_label_is_made_of(tmp_path):
    files = ["/a/*.py", "/a?/*.py", "/a//*.py", "a", "b"]
    points = points_of(Sweep(points=product({"data.files": files}), fields={"data.source": "files"}), {})
    paths = [point.run(tmp_path, 1, rate).path.name for point in points for rate in (0.001, 0.001 + 1e-11)]
    assert len({*paths}) == 10 and all("-rate0.001-seed1" in path for path in paths[::2])
    assert [point.name.partition("files=")[2] for point in points][-2:] == ["a", "b"]


BAD = {
    "points=[]": "has no points",
    "points=['SM']": "points must be mappings of fields to values, not 'SM'",
    "points=[{'architecture': 'SM+X'}]": "'X' is not understood",
    "points=[{'train.num_step': 3}]": "config.train.num_step is not a field; did you mean 'train.num_steps'?",
    "points=[{'train.num_steps': 1.5}]": "config.train.num_steps=1.5 must be a whole number",
    "points=[{'train.num_steps': 0}]": "config.train.num_steps=0 must be at least 1",
    "points=[{'train.keep': 1}, {'train.keep': 1}]": "two points of the sweep are the same: EReg(SM(t)+ScFuFFN), keep",
    "points=[{'seed': 1}]": "seeds=(1, 2, 3) are those of its runs; seed is no field of a point",
    "points='SM'": "points='SM' must be a list of mappings of fields to values",
    "points=[{}], config=None": "config=None must be a file, by path or name, or a ConfigDict",
    "points=[{}], seeds=3": "seeds=3 must be a list of whole numbers",
    "points=[{}], fields=['seed']": "fields=['seed'] must be a mapping",
    "points=[{}], published={'SM': 3.0}": "published must be Published(…), not 3.0",
    "points=[{}], tuning=(1e-3, 3e-3)": "tuning=(0.001, 0.003) must be Tuning(rates, seed, share), or None",
    "points=[{}], tuning=Tuning(rates=('a',))": "tuning.rates=('a',) must be different numbers above 0",
    "points=[{}], tuning=Tuning(rates=(1, 1))": "tuning.rates=(1, 1) must be different numbers",
    "points=[{'architecture': 'SM'}], baselines='SM'": "baselines='SM' must be a list of labels of points",
    "points=[{}], pictures='loss'": "pictures='loss' must be a list of names of figures",
    "points=[{}], config='quikstart'": "did you mean 'quickstart'?",
    "points=[{}], seeds=()": "seeds=() must be different",
    "points=[{}], seeds=(1, 1)": "seeds=(1, 1) must be different",
    "points=[{}], seeds=(-1,)": "seeds=(-1,) must be different, at least one, from 0 to 2^64 − 1",
    "points=[{}], seeds=(2**64,)": "seeds=(18446744073709551616,) must be different, at least one, from 0 to",
    "points=[{}], seeds=('a',)": "seeds must be whole numbers, not 'a'",
    "points=[{}], tuning=Tuning(seed=2)": "tuning.seed=2 is one of the reported seeds=(1, 2, 3)",
    "points=[{}], tuning=Tuning(rates=())": "tuning.rates=() must be",
    "points=[{}], tuning=Tuning(share=2)": "tuning.share=2 must be above 0 and at most 1",
    "points=[{'train.num_steps': 9, 'optimizer.warmup': 3}], tuning=Tuning(share=0.3)": "its rate has 3 steps",
    "points=[{'architecture': 'SM'}], baselines=['SM+LN']": "baselines names 'SM+LN', which is no point of it",
    "points=[{}], pictures=['los']": "pictures names 'los', which is none; did you mean 'loss'?",
    "points=[{}], seed=(1,)": "line 3: TypeError",
    "points=[{}][2]": "line 3: IndexError",
}


def refused(capsys, *arguments):
    """What is said, in one line, of a command that ends with code 2."""
    assert main(["sweep", *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and said.startswith("jax-entropy: "), said
    return said


@pytest.mark.parametrize("given", BAD)
def test_mistakes_in_a_file(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    body = f"from jax_entropy.sweep import Sweep, Tuning\ndef get_sweep(scale):\n    return Sweep({given})\n"
    (tmp_path / "mine.py").write_text(body)
    assert BAD[given] in refused(capsys, "mine.py")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]  # nothing was begun


LINES = {
    "": "sweep takes one file",
    "table2 table3": "sweep takes one file, or a name of configs/sweeps like table2, not 2",
    "tabel2": "'tabel2' is no sweep file; did you mean 'table2'?",
    "configs/sweeps/none.py": "is no sweep file",
    "table2 --jobs=0": "jobs=0 must be at least 1",
    "table2 --jobs=10000": "jobs=10000 is more than the",
    "table2 --config.seed=4": "are those of its runs; seed is no field of a point",
    "table2 --jobs=x": "--jobs=x must be a whole number",
    "table2 --scale=smal": "--scale='smal' is not known; did you mean 'small'?",
    "table2 --config.train.num_steps=x": "config.train.num_steps=x must be a whole number",
    "table2 --config.train.step=1": "there is no flag --config.train.step",
    "empty.py": "has no function get_sweep",
    "none.py": "returns NoneType, not a Sweep",
    "nothing.py": "must take a scale",
}


@pytest.mark.parametrize("line", LINES)
def test_mistakes_in_a_command(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "none.py").write_text("def get_sweep(scale): pass")
    (tmp_path / "nothing.py").write_text("def get_sweep(): pass")
    assert LINES[line] in refused(capsys, *line.split())
    assert len(list(tmp_path.iterdir())) == 3


def test_each_job_has_its_share_of_the_cores_or_of_the_gpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 5, 7})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert places(1) == [Place()] and places(2) == [Place("0,2,7"), Place("1,5")]
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,6")
    found = [dict(place.variables) for place in places(2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": "3,6"}, {"CUDA_VISIBLE_DEVICES": "4"}]
    with pytest.raises(UserError, match="jobs=4 is more than the 3 GPUs"):
        places(4)
