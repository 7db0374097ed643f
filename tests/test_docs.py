"""The documentation is up to date and its links lead somewhere."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("**/*.md")), *(ROOT / n for n in ("README.md", "CONTRIBUTING.md"))]


@pytest.fixture
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_up_to_date(generate):
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run: python docs/generate.py"
    assert generate.BOARD_PAGE.read_text(encoding="utf-8") == generate.leaderboard(), "run: python docs/generate.py"
    assert generate.README.read_text(encoding="utf-8") == generate.readme(), "run: python docs/generate.py"
    assert generate.PLAN_PAGE.read_text(encoding="utf-8") == generate.planning(), "run: python docs/generate.py"


def test_measurements_become_a_table(generate, tmp_path, monkeypatch):
    times = {"median_ms": 12.3, "peak_mib": 45.6}
    result = {
        "command": "attnzoo bench attention",
        "sizes": {"B": 1, "T": 64},
        "environment": {"cores": 2, "machine": "x86_64", "jax": "0.10.2"},
        "rows": {"ours": {"forward": times, "forward+backward": times}},
    }
    monkeypatch.setattr(generate, "MEASURED", tmp_path / "result.json")
    assert "Not recorded" in generate.measured()
    generate.MEASURED.write_text(json.dumps(result))
    assert "| ours | 12 | 46 | 12 | 46 |" in generate.measured()


def test_a_leaderboard_becomes_a_table(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BOARD", tmp_path / "leaderboard.json")
    assert "Not recorded" in generate.leaderboard()
    equal = {
        "scores": [2.5, 2.7], "step_seconds": 0.0303, "decode_seconds": 0.00125, "cache_bytes": 1536.0,
        "parameters": 123456, "mlp_dim": 176, "settings": {},
    }  # fmt: skip
    small = {**equal, "scores": [2.8], "cache_bytes": 384.0, "settings": {"num_kv_heads": 1}}
    stateless = {**equal, "decode_seconds": None, "cache_bytes": None}
    board = {
        "suite": {
            "config": {
                "mixer": "transformer", "steps": 300, "batch": 8, "data": {"name": "topics", "context": 128},
                "model": {"num_layers": 3, "dim": 64, "num_heads": 4, "positions": "rope"},
            },
            "seeds": [0, 1], "cache_share": 0.25, "decode_length": 1024, "decode_batch": 8,
        },
        "metric": "bits per byte", "baselines": {"bigram": 3.7}, "cache_budget": 384.0, "seconds": 1230.0,
        "entries": [
            {
                "mixer": "transformer", "equal_parameters": equal, "equal_cache": small, "reason": "", "positions": "rope",
            },
            {
                "mixer": "mlp", "equal_parameters": stateless, "equal_cache": None, "reason": "it does not decode",
                "positions": "learned",
            },
        ],
        "skipped": {"odd": "takes no such model"},
        "environment": {"cores": 2, "machine": "x86_64", "python": "3.11", "jax": "0.10.2", "flax": "0.12.8"},
    }  # fmt: skip
    generate.BOARD.write_text(json.dumps(board))
    page = generate.leaderboard()
    assert "| `transformer` | 2.600 | 30.3 | 1.25 | 1,536 | 2.800 | 1.25 | 384 | `num_kv_heads=1` |" in page
    assert "| `mlp`, learned positions | 2.600 | 30.3 |  |  |  |  |  | it does not decode |" in page
    assert "`odd` is left out: takes no such model" in page
    assert "25% of what `transformer` takes" in page
    assert "in 20 minutes on 2 CPU cores" in page


def test_plans_become_a_table(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PLANS", tmp_path)
    assert "train.plan.recorded" in generate.plan_table()
    config = {
        "mixer": "tpa", "batch": 64, "accumulate": 1, "model": {"remat": "dots"},
        "mesh": {"data": 1, "fsdp": 4, "tensor": 2, "context": 1, "exchange": "ring"},
    }  # fmt: skip
    asked = {
        "config": config, "parameters": 1_234_000_000, "attention": ["pallas (the first)"], "needed": 20 * 2**30,
        "usable": 16 * 2**30, "roofline": None, "flops": {"missing": []}, "collectives": [],
    }  # fmt: skip
    fits = {
        **asked, "config": {**config, "accumulate": 4}, "needed": 12 * 2**30, "collectives": [{"received": 2**30}] * 2,
        "flops": {"missing": [], "model": 1e14, "compiled": 2e14}, "roofline": {"seconds": 2.0, "limiter": "network"},
    }  # fmt: skip
    made = {
        "preset": "llm-1b", "topology": "v5e:2x4", "units_per_step": 64 * 2048, "chip": {"flops": 2e14, "devices": 1},
        "versions": {"python": "3.11", "jax": "0.10.2"}, "plan": asked,
        "search": {
            "found": "--accumulate 4",
            "tries": [{"change": "--model.remat full", "plan": None}, {"change": "--accumulate 4", "plan": fits}],
        },
    }  # fmt: skip
    (tmp_path / "llm-1b.json").write_text(json.dumps(made))
    page = generate.plan_table()
    start = "| `llm-1b`, `tpa`, 1.23 B | v5e:2x4 | fsdp 4, tensor 2 | 64 × 2,048, dots | pallas |"
    assert f"{start} 20.0 of 16 |  |  |  | does not fit |  |" in page
    assert "| … with `--accumulate 4` | | fsdp 4, tensor 2 | 64 × 2,048 in 4 parts, dots | pallas | 12.0 of 16 |" in page
    assert "| 200 | 2.0 | 2000 | network | 25% |" in page
    assert "jax 0.10.2" in page
    silent = {**fits, "flops": {"missing": ["the kernel scan"], "model": None, "compiled": None}}
    (tmp_path / "llm-1b.json").write_text(json.dumps({**made, "plan": silent, "search": None, "units_per_step": 64}))
    assert f"{start.replace(' × 2,048', '').replace('64,', '64 in 4 parts,')} 12.0 of 16 | not known |" in generate.plan_table()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_navigation_names_every_page():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/]+\.md)$", config, flags=re.MULTILINE))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("**/*.md")}


def test_api_pages_name_what_exists():
    for page in (ROOT / "docs").glob("**/*.md"):
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert importlib.util.find_spec(name), f"{page.name}: {name}"
