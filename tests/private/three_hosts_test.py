"""Server, assistant and client on three hosts: network namespaces, each pair on a wire of its own."""

import itertools
import subprocess

import pytest

from jax_entropy.private.session.keys import ROLES, make_all_keys
from tests.private.helpers import start, wait_for_line

pytestmark = [pytest.mark.usefixtures("installed"), pytest.mark.long]
SUBNETS = {pair: f"10.77.{number}" for number, pair in enumerate(itertools.combinations(ROLES, 2))}


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def address(of, seen_from):
    """Where one host reaches another: each pair has a network of its own."""
    pair = tuple(sorted((of, seen_from), key=ROLES.index))
    return f"{SUBNETS[pair]}.{1 + pair.index(of)}"


@pytest.fixture
def hosts():
    """What runs a command on the host of each role."""
    names = {role: f"jax_entropy_{role}" for role in ROLES}
    try:
        for name in names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for number, (one, other) in enumerate(SUBNETS):
            ends = f"je{number}a", f"je{number}b"
            ip("link", "add", ends[0], "netns", names[one], "type", "veth", "peer", ends[1], "netns", names[other])
            for end, role, peer in zip(ends, (one, other), (other, one), strict=True):
                ip("-n", names[role], "addr", "add", f"{address(role, peer)}/24", "dev", end)
                ip("-n", names[role], "link", "set", end, "up")
        yield {role: ("ip", "netns", "exec", name) for role, name in names.items()}
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_three_hosts_write_the_plain_models_text(hosts, workdir, tmp_path):
    from jax_entropy.generate import generate
    from jax_entropy.runs.load import load_run

    make_all_keys(tmp_path / "keys", 3, 2)
    run = lambda role, *arguments: start(  # noqa: E731
        *arguments, f"--keys={tmp_path / 'keys' / role}", cwd=tmp_path / role, before=hosts[role]
    )
    serving = run("server", "serve", f"--workdir={workdir}", "--protocol=aby3", "--listen=0.0.0.0:9500")
    server = f"--server={address('server', 'assistant')}:9500"
    assisting = run("assistant", "assist", server, "--listen=0.0.0.0:9700")
    try:
        assert "aby3: protects as long as no two" in serving.stdout.readline()  # the first line
        wait_for_line(serving, "serves ", 300)
        wait_for_line(assisting, "assists ", 300)
        asking = run(
            "client", "ask", f"--server={address('server', 'client')}:9500",
            f"--assistant={address('assistant', 'client')}:9700", "--prompt=def f", "--tokens=6",
        )  # fmt: skip
        out, err = asking.communicate(timeout=300)
        assert asking.returncode == 0, err
        expected = "def f" + generate(load_run(workdir, print), "def f", num_tokens=6, temperature=0)
        assert out == expected + "\n" and "mutual TLS" in err
    finally:
        for process in (serving, assisting):
            process.kill()
            process.wait()
