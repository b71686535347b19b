from __future__ import annotations

from pathlib import Path

import pytest

from faceflow import ClusterConfig
from faceflow.cli.main import main
from faceflow.cli.parser import build_parser
from faceflow.config import SETTINGS
from faceflow.config_loading import load_config
from faceflow.errors import SettingsError


def test_flags_win_over_toml_over_defaults(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text('input = "a"\noutput = "b"\nneighbors = 40\nmin-similarity = 0.6\n')
    config = load_config({"neighbors": "50"}, str(toml))
    assert (config.input, config.neighbors, config.min_similarity, config.seed) == ("a", 50, 0.6, 0)


def test_no_threshold() -> None:
    assert load_config({"input": "a", "output": "b", "min_similarity": "none"}).min_similarity is None


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("neighbours = 3", "unknown setting 'neighbours'; did you mean 'neighbors'?"),
        ("neighbors = 3.5", "neighbors is 3.5: it must be a whole number"),
        ("neighbors = true", "neighbors is True: it must be a whole number"),
        ("id_column = 3", "id_column is 3: it must be a text"),
        ("neighbors = ", "is not valid TOML"),
    ],
)
def test_bad_toml(tmp_path: Path, toml: str, message: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(toml)
    with pytest.raises(SettingsError) as caught:
        load_config({"input": "a", "output": "b"}, str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"neighbors": 0}, "neighbors is 0: it must lie between 1 and 10000"),
        ({"min_similarity": 1.5}, "min_similarity is 1.5: a cosine lies between -1 and 1; or 'auto', or 'none'"),
        ({"index": "cell"}, "index is 'cell'; did you mean 'cells'?"),
        ({"run_id": "../x"}, "run_id is '../x': use"),
        ({"id_column": "embedding"}, "they must differ"),
        ({"input": ""}, "input is empty"),
    ],
)
def test_bad_values(setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        ClusterConfig(**({"input": "a", "output": "b"} | setting))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_secrets_stay_out_of_public_settings() -> None:
    config = load_config({"input": "a", "output": "b", "storage_options": '{"secret": "hush"}'})
    assert config.storage_options == {"secret": "hush"}
    assert "hush" not in str(config.public())
    with pytest.raises(SettingsError) as caught:
        load_config({"input": "a", "output": "b", "storage_options": '{"secret": "hush"'})
    assert "hush" not in str(caught.value)


def test_every_setting_has_a_flag_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["nightly", "--help"])
    text = capsys.readouterr().out
    for name, field in SETTINGS.items():
        if name not in ("input", "output"):
            assert f"--{name.replace('_', '-')}" in text
            assert field.help


def test_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cluster", "a", "b", "--neighbours", "3"])
    assert caught.value.code == 2
    assert "did you mean '--neighbors'?" in capsys.readouterr().err


def test_missing_input_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster"]) == 2
    assert "input is missing" in capsys.readouterr().err
