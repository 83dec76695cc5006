"""The published layouts, read from disk, and what is said of files that are not as published."""

import json

import pytest

from rlhf_ray.failures import BadInput
from rlhf_ray.reward.judge.benchmarks import load_benchmark

KEY = "evaluation.benchmarks"
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "hep-go"}
BEST_OF_4 = {"id": "1", "prompt": "p", "chosen": ["c"], "rejected": ["r"] * 3, "subset": "Math", "num_correct": 1}
STYLES = {"id": 1, "prompt": "p", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "chat"}
JUDGED = {
    "question": "p",
    "source": "livecodebench",
    "response_model": "claude-3-5-sonnet-20240620",
    "response_A": "a",
    "response_B": "b",
    "label": "A>B",
}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(file, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def test_reward_bench_leaves_the_raw_split_out_and_takes_prior_sets_by_file_name(tmp_path):
    write_parquet(tmp_path / "raw-00000-of-00001.parquet", [PAIR])
    write_parquet(tmp_path / "filtered-00000-of-00001.parquet", [PAIR])
    alone = load_benchmark("reward-bench", str(tmp_path), KEY)
    assert [case.place.rpartition("/")[2] for case in alone.cases] == ["filtered-00000-of-00001.parquet:row 1"]
    assert "shp" not in alone.published
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q"}, {"role": "user", "content": "s"}]
    write_parquet(
        tmp_path / "anthropic_hhh-00000-of-00001.parquet",
        [{"prompt": turns, "chosen": "c", "rejected": "r", "subset": "harmless"}],
    )
    write_parquet(tmp_path / "mtbench_human-00000-of-00001.parquet", [{"prompt": turns, "chosen": "c"}])
    both = load_benchmark("reward-bench", str(tmp_path), KEY)
    assert [case.subset for case in both.cases] == ["anthropic_hhh", "hep-go"]
    assert both.cases[0].prompt == tuple(turns)
    assert both.published["shp"] == 1741


def test_rm_bench_reads_lists_and_prefers_the_whole_data_set(tmp_path):
    without_domain = {name: value for name, value in STYLES.items() if name != "domain"}
    (tmp_path / "safety-refuse_filtered.json").write_text(json.dumps([without_domain] * 2, indent=4))
    (tmp_path / "chat_filtered.json").write_text(json.dumps([without_domain]))
    parts = load_benchmark("rm-bench", str(tmp_path), KEY)
    assert [case.subset for case in parts.cases] == ["chat", "safety-refuse", "safety-refuse"]
    assert parts.cases[2].place == f"{tmp_path}/safety-refuse_filtered.json:row 2"
    (tmp_path / "total_dataset.json").write_text(json.dumps([STYLES | {"domain": "math"}]))
    whole = load_benchmark("rm-bench", str(tmp_path), KEY)
    assert [case.subset for case in whole.cases] == ["math"]


def test_judge_bench_folder_holds_both_models(tmp_path):
    write_rows(tmp_path / "dataset=judgebench,response_model=claude-3-5-sonnet-20240620.jsonl", [JUDGED])
    write_rows(
        tmp_path / "dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl",
        [JUDGED | {"response_model": "gpt-4o-2024-05-13", "source": "livebench-math"}],
    )
    benchmark = load_benchmark("judge-bench", str(tmp_path), KEY)
    assert [case.subset for case in benchmark.cases] == ["claude-3-5-sonnet-20240620/coding", "gpt-4o-2024-05-13/math"]


@pytest.mark.parametrize(
    ("name", "good", "change", "found"),
    [
        ("reward-bench", PAIR, {"subset": "hep-cobol"}, "`subset` is 'hep-cobol'"),
        ("reward-bench", PAIR, {"chosen": None}, "has no `chosen`"),
        ("reward-bench", PAIR, {"chosen": ["c"]}, "`chosen` is not a string"),
        ("reward-bench", PAIR, {"prompt": [{"role": "user"}]}, "message 1 of `prompt` is malformed"),
        ("reward-bench-2", BEST_OF_4, {"chosen": ["c", "d"]}, "`chosen` has 2 responses"),
        ("reward-bench-2", BEST_OF_4, {"num_correct": 2}, "`num_correct` is 2"),
        ("reward-bench-2", BEST_OF_4, {"rejected": []}, "`rejected` is not a list of strings"),
        ("reward-bench-2", BEST_OF_4, {"subset": "Ties"}, "`id` is '1'"),
        ("reward-bench-2", BEST_OF_4, {"subset": "Ties", "id": "tied:1"}, "`chosen` has 1 response"),
        ("rm-bench", STYLES, {"chosen": ["a", "b"]}, "`chosen` has 2 and `rejected` 3 responses"),
        ("rm-bench", STYLES, {"domain": "safety"}, "`domain` is 'safety'"),
        ("judge-bench", JUDGED, {"label": "A=B"}, "`label` is 'A=B'"),
        ("judge-bench", JUDGED, {"source": "gsm8k"}, "`source` is 'gsm8k'"),
        ("judge-bench", JUDGED, {"response_model": "gpt-2"}, "`response_model` is 'gpt-2'"),
    ],
)
def test_a_row_that_is_not_as_published_is_named(tmp_path, name, good, change, found):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [good, good | change])
    with pytest.raises(BadInput) as error:
        load_benchmark(name, str(file), KEY)
    assert error.value.where == f"{file}:2"
    assert found in error.value.found


def test_broken_json_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n{broken\n")
    with pytest.raises(BadInput, match=r"a\.jsonl:2: is not JSON"):
        load_benchmark("reward-bench", str(tmp_path), KEY)
    (tmp_path / "total_dataset.json").write_text('[\n{"id": 1},\n{broken]')
    with pytest.raises(BadInput, match=r"total_dataset\.json:3: is not JSON"):
        load_benchmark("rm-bench", str(tmp_path), KEY)
    (tmp_path / "total_dataset.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"total_dataset\.json:row 1: the row is not an object"):
        load_benchmark("rm-bench", str(tmp_path), KEY)
    with pytest.raises(BadInput, match=r"evaluation\.benchmarks: .*does not exist"):
        load_benchmark("rm-bench", str(tmp_path / "nowhere"), KEY)


def test_more_rows_than_published_are_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [PAIR] * 165)
    with pytest.raises(BadInput, match=r"165 rows of 'hep-go'.*the 164 published ones"):
        load_benchmark("reward-bench", str(tmp_path), KEY)


def test_a_prompt_of_ties_comes_once_in_each_form(tmp_path):
    ref = BEST_OF_4 | {"subset": "Ties", "id": "ref:1"}
    write_rows(tmp_path / "a.jsonl", [ref, ref])
    with pytest.raises(BadInput, match=r"a\.jsonl:2: `id` 'ref:1' is also that of .*a\.jsonl:1"):
        load_benchmark("reward-bench-2", str(tmp_path), KEY)
