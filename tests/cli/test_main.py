"""The entry point: help, version, exit codes, errors without tracebacks, and a quick start."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import turboquant
from turboquant import cli
from turboquant.cli import app as app_module
from turboquant.cli.app import app
from turboquant.errors import ConfigError

runner = CliRunner()
COMMANDS = ("generate", "eval", "plan", "doctor")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["turboquant", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)


def test_no_arguments_print_help() -> None:
    result = runner.invoke(app, [])
    assert result.exit_code in (0, 2)  # typer's own choice differs between versions
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"turboquant-cache {turboquant.__version__}"


def test_errors_of_the_package_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TURBOQUANT_DEBUG", raising=False)
    assert run_main(monkeypatch, "plan", "/no/such/folder", "--memory", "1GiB") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: there is no file or folder /no/such/folder\n"


def test_messages_keep_their_brackets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TURBOQUANT_DEBUG", raising=False)

    def fail() -> None:
        raise ConfigError('pip install "turboquant-cache[hf]"')

    monkeypatch.setattr(app_module, "app", fail)
    assert run_main(monkeypatch) == 2
    assert capsys.readouterr().err == 'error: pip install "turboquant-cache[hf]"\n'


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["turboquant", "plan", "/no/such/folder", "--memory", "1GiB"])
    with pytest.raises(ConfigError, match="no file"):
        cli.main()


def test_wrong_usage_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "plan") == 2
    assert run_main(monkeypatch, "no-such-command") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 1)])
def test_interrupts_are_quiet(error: BaseException, code: int) -> None:
    # In a process of its own: the handler of a broken pipe closes stdout for good.
    result = python(
        "import sys, turboquant.cli as cli, turboquant.cli.app as a\n"
        f"def fail(): raise {type(error).__name__}\n"
        "a.app = fail\n"
        "cli.main()"
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app_module, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich_one_line_says_so(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("turboquant.cli.") or n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cli, "app", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    code = run_main(monkeypatch, "--version")
    monkeypatch.undo()
    assert code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert 'pip install "turboquant-cache[cli]"' in err
    assert err.count("\n") == 1


def test_help_and_plan_do_not_load_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    code = (
        "import sys\n"
        "from turboquant import cli\n"
        "import turboquant.cli.app\n"
        "folder = sys.argv[1]\n"
        "def run(*args):\n"
        "    sys.argv = ['turboquant', *args]\n"
        "    try: cli.main()\n"
        "    except SystemExit as e: assert not e.code, e.code\n"
        "run('--help')\n"
        "run('plan', folder, '--memory', '1GiB')\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    result = python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "turboquant_3bit" in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="a shell pipe")
def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "import sys\n"
        "sys.argv = ['turboquant', 'plan', sys.argv[1], '--memory', '1GiB', '--json']\n"
        "from turboquant.cli import main\n"
        "main()\n"
    )
    with os.fdopen(writer, "wb") as out:
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], stdout=out, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert result.stderr == ""
    assert result.returncode == 1
