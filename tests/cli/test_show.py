"""`hf-attn show` and `hf-attn list`: pictures, and clear refusals with exit status 2."""

import pytest

from hf_attn_plugin.cli.main import main
from hf_attn_plugin.config import METHOD_CONFIGS


def test_longformer(capsys) -> None:
    assert main(["show", "longformer", "--window", "2", "--global", "1", "--length", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0 x . . .",
        "1 x x . .",
        "2 x x x .",
        "3 x . x x",
    ]


def test_decoding_step_with_padding_and_documents(capsys) -> None:
    line = ["show", "flash", "--length", "6", "--queries", "1", "--documents", "3,3"]
    assert main([*line, "--pad-right", "1"]) == 0
    assert capsys.readouterr().out == "0 . . . x x .\n"


def test_png(tmp_path, capsys) -> None:
    path = tmp_path / "strided.png"
    assert main(["show", "strided", "--png", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sliding_window --stride 3", "no --stride"),
        ("sliding_window --window 0", "integer >= 1"),
        ("flash --length 0", "--length must be at least 1"),
        ("flash --length 600", "up to 512"),
        ("flash --queries 40", "--queries must be from 1 to 32"),
        ("flash --documents 3,3", "add up to --length 32"),
        ("flash --documents 1,a", "add up to --length 32"),
        ("flash --model-window 0", "--model-window must be at least 1"),
        ("flash --pad-left 30 --pad-right 3", "must fit --length 32"),
    ],
)
def test_refusals(line: str, message: str, capsys) -> None:
    assert main(["show", *line.split()]) == 2
    assert message in capsys.readouterr().err


def test_list_names_every_method(capsys) -> None:
    assert main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(METHOD_CONFIGS)
