from pathlib import Path

from rlhf_ray.config.settings import LearnerSettings, PPOConfig
from rlhf_ray.documentation import PAGES, metrics_page, settings_page, stale_pages
from rlhf_ray.tracking.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"


def test_pages_on_disk_agree_with_the_code():
    assert not stale_pages(DOCS), "run `python -m rlhf_ray.documentation`"


def test_a_changed_or_missing_page_is_stale(tmp_path):
    for name, page in PAGES.items():
        (tmp_path / name).write_text(page())
    assert stale_pages(tmp_path) == []
    (tmp_path / "metrics.md").write_text(metrics_page() + "edited by hand\n")
    (tmp_path / "settings.md").unlink()
    assert {path.name for path in stale_pages(tmp_path)} == set(PAGES)


def test_every_setting_has_its_bounds_default_and_meaning_and_shared_sections_come_once():
    page = settings_page()
    assert "| `steps` | integer ≥ 1 | `100` |" in page
    assert "| `dual_clip` | number > 1 or empty | *empty* |" in page
    assert "| `critic` | [critic](#critic) or empty | *empty* |" in page
    assert "| `zero_stage` | `0`, `1`, `2`, `3` | `1` |" in page
    assert page.count("\n### learner\n") == 1
    assert "ppo: `policy.learner`, `critic.learner`; sft: `policy.learner`; train-rm: `learner`" in page
    for section in (PPOConfig, LearnerSettings):
        for name, field in section.model_fields.items():
            assert f"| `{name}` |" in page
            assert field.description
    assert [line for line in page.splitlines() if line.endswith("|  |")] == []


def test_a_section_says_where_its_defaults_are_others():
    """They are those of the place where it stands, not of its class."""
    page = settings_page()
    assert "| `checkpoint` | [checkpoint](#checkpoint) | its defaults |" in page
    assert "| `checkpoint` | [checkpoint](#checkpoint) | its defaults, but `every_steps` `50` |" in page
    assert "| `checkpoint` | [checkpoint](#checkpoint) | its defaults, but `every_steps` `200` |" in page


def test_every_metric_is_on_its_page():
    page = metrics_page()
    for metrics in METRICS.values():
        for metric in metrics:
            assert f"| `{metric.name}` | {metric.unit or '—'} | " in page
