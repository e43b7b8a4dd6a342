import inspect
import io
import sys
import types

import pytest
from rich.console import Console
from rich.table import Table

from jaxtune import cli, errors


def test_callable_module_is_both_module_and_function(monkeypatch):
    module = types.ModuleType("some_verb")
    module.helper = 5
    monkeypatch.setitem(sys.modules, "some_verb", module)

    def some_verb(model, temperature=0.0):
        return model, temperature

    cli.callable_module("some_verb", some_verb)
    assert module("m", temperature=1.0) == ("m", 1.0)
    assert module.helper == 5
    assert list(inspect.signature(module).parameters) == ["model", "temperature"]


def test_overrides_may_stand_around_options():
    parser = cli.config_parser("plan")
    parser.add_argument("--target")
    args = cli.parse(parser, ["c.yaml", "lora.r=4", "--target", "v5e-8", "seed=1"])
    assert (args.config, args.overrides, args.target) == ("c.yaml", ["lora.r=4", "seed=1"], "v5e-8")


def test_no_verb_lists_the_verbs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxtune"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


def test_an_unknown_verb_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxtune", "trian"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "trian is not a verb of jaxtune; did you mean train?" in capsys.readouterr().err


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxtune", "--version"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("jaxtune ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: CONFIG.yaml\n"),
        (["c.yaml", "--learning_rate", "2e-4"], "written without dashes: learning_rate=VALUE"),
        (["c.yaml", "--lora.r=4"], "written without dashes: lora.r=VALUE"),
    ],
)
def test_what_is_wrong_with_the_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.parse(cli.config_parser("train"), arguments)
    assert said in capsys.readouterr().err


def test_columns_on_the_command_line():
    cli.add_columns(parser := cli.parser("score"))
    assert cli.parse(parser, ["--columns", "prompt=question", "completion=a=b"]).columns == {"prompt": "question", "completion": "a=b"}
    with pytest.raises(errors.ConfigError, match="--columns prompt: write OURS=THEIRS"):
        cli.parse(parser, ["--columns", "prompt"])
    assert cli.parse(parser, []).columns == {} and "None" not in parser.format_help()


def test_a_table_shows_square_brackets_as_they_are():
    table, out = Table("key"), io.StringIO()
    table.add_row("[configs/rows.jsonl]")
    cli.print_table(Console(file=out, width=8), table)
    assert "[configs/rows.jsonl]" in out.getvalue()
