"""The audit log shows every change, outlives a crash, and gives back each score to the bit."""

import asyncio
import hmac
import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.serving import AuditSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.serve import application
from rlhf_ray.reward.serve.application import AuditQueue
from rlhf_ray.reward.serve.audit import AuditLog, AuditRecord, Head, LoggedScore, text_hash, verified_records, verify
from rlhf_ray.reward.serve.audit_replay import replay

SCORES = [0.1, -1e-300, 1 / 3, 5e-324, -0.0, 123456789.123456789]


def records(count: int, first: int = 0) -> list[AuditRecord]:
    return [
        AuditRecord(f"r{index}", "main", "v1", [index, 7, 2**31], index % 2 == 0, SCORES[index % 6], True)
        for index in range(first, first + count)
    ]


def write(folder: Path, count: int, first: int = 0, writer: str = "replica", **chosen: Any) -> None:
    with AuditLog(folder, AuditSettings(**chosen), writer) as log:
        for start in range(first, first + count, 3):
            log.append(records(min(3, first + count - start), start))


def files(folder: Path, writer: str = "replica") -> list[Path]:
    return sorted(folder.glob(f"{writer}-*.jsonl"))


def test_a_record_comes_back_as_it_was(tmp_path: Path):
    write(tmp_path, 6)
    found = [record for _, record in verified_records(tmp_path)]
    assert [record.score.hex() for record in found] == [score.hex() for score in SCORES]
    assert [(record.seq, record.request_id, record.num_tokens) for record in found] == [
        (index, f"r{index}", 3) for index in range(6)
    ]
    assert [record.truncated for record in found] == [True, False] * 3
    assert found[1].token_ids is None
    assert found[1].text_hash == hmac.digest(b"", struct.pack("<3I", 1, 7, 2**31), "sha256").hex()
    [path] = files(tmp_path)
    assert [place for place, _ in verified_records(tmp_path)] == [f"{path}:{line}" for line in range(2, 8)]


def test_the_caller_is_in_the_chain_and_a_line_without_one_is_of_an_earlier_log(tmp_path: Path):
    record = replace(records(1)[0], caller="trainer")
    with AuditLog(tmp_path, AuditSettings(), "replica") as log:
        log.append([record, replace(record, caller=None)])
    assert [found.caller for _, found in verified_records(tmp_path)] == ["trainer", None]
    [path] = files(tmp_path)
    assert b'"caller":"trainer",' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'"trainer"', b'"another"'))
    with pytest.raises(BadInput, match="the hash is wrong"):
        verify(tmp_path)
    _, body, _ = path.read_bytes().splitlines()
    values = json.loads(body)
    del values["caller"], values["hash"]
    assert LoggedScore.model_validate_json(json.dumps(values)).caller is None


def test_token_ids_are_kept_only_when_asked_for(tmp_path: Path):
    write(tmp_path / "hash", 1)
    write(tmp_path / "full", 1, texts="full")
    assert "token_ids" not in files(tmp_path / "hash")[0].read_text()
    [(_, record)] = verified_records(tmp_path / "full")
    assert record.token_ids == (0, 7, 2**31)


def test_full_files_are_closed_and_the_chain_goes_on(tmp_path: Path):
    write(tmp_path, 40, max_bytes=1500)
    paths = files(tmp_path)
    assert len(paths) > 3
    assert all(1500 <= path.stat().st_size < 2000 for path in paths[:-1])
    verified = verify(tmp_path)
    assert (verified.writers[0].num_files, verified.num_records) == (len(paths), 40)
    last = json.loads(paths[0].read_text().splitlines()[-1])
    first = json.loads(paths[1].read_text().splitlines()[0])
    assert first["previous_hash"] == last["hash"]
    assert first["first_seq"] == last["seq"] + 1


def test_old_files_go_and_the_chain_says_where_it_begins(tmp_path: Path):
    write(tmp_path, 60, max_bytes=1500, keep_files=2)
    paths = files(tmp_path)
    assert len(paths) == 3, "two that are closed, and the one that is written"
    verified = verify(tmp_path).writers[0]
    assert verified.first_seq + verified.num_records == 60
    assert verified.first_seq > 0
    write(tmp_path, 5, first=60, max_bytes=1500, keep_files=2)
    assert verify(tmp_path).writers[0].first_seq > verified.first_seq

    # What the log deletes itself is noted; what is deleted besides is missing.
    first = files(tmp_path)[0]
    first.unlink()
    with pytest.raises(BadInput, match="which is missing"):
        verify(tmp_path)


def test_a_file_that_outlived_its_deletion_is_left_out_and_goes_next_time(tmp_path: Path):
    write(tmp_path, 20, max_bytes=1500)
    oldest = files(tmp_path)[0]
    kept = oldest.read_bytes()
    write(tmp_path, 20, first=20, max_bytes=1500, keep_files=1)
    oldest.write_bytes(kept)
    verify(tmp_path)
    write(tmp_path, 1, first=40, keep_files=1)
    assert not oldest.exists()


def test_writers_have_chains_of_their_own(tmp_path: Path):
    write(tmp_path, 4, writer="one")
    write(tmp_path, 5, writer="two-2")
    assert [(each.writer, each.num_records) for each in verify(tmp_path).writers] == [("one", 4), ("two-2", 5)]
    with (
        AuditLog(tmp_path, AuditSettings(), "one"),
        pytest.raises(BadInput, match="another process writes this chain"),
    ):
        AuditLog(tmp_path, AuditSettings(), "one")
    with pytest.raises(ValueError, match="cannot name a file"):
        AuditLog(tmp_path, AuditSettings(), "../one")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of several files from two starts, with an anchor."""
    folder = tmp_path_factory.mktemp("sound")
    write(folder, 12, max_bytes=900, keep_files=4)
    write(folder, 4, first=12, max_bytes=900, texts="full", keep_files=4)
    verify(folder)
    assert (folder / "replica.anchor.json").is_file()
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_that_is_changed_is_noticed(sound: Path, tmp_path: Path, data: Any):
    paths = files(sound)
    path = data.draw(st.sampled_from(paths))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["other", "inserted", "removed"]))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[position]))
    if change == "other":
        content[position] = byte
    elif change == "inserted":
        content.insert(position, byte)
    else:
        del content[position]
    folder = Path(shutil.copytree(sound, tmp_path / "altered", dirs_exist_ok=True))
    (folder / path.name).write_bytes(bytes(content))
    with pytest.raises(BadInput) as caught:
        verify(folder)
    file, _, line = caught.value.where.rpartition(":")
    assert Path(file).name == path.name
    assert int(line) == path.read_bytes()[:position].count(b"\n") + 1


def altered_lines(sound: Path, folder: Path, change: Any) -> Path:
    """A copy whose second file has other lines."""
    shutil.copytree(sound, folder)
    path = files(folder)[1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))
    return path


@pytest.mark.parametrize(
    ("change", "line", "found"),
    [
        (lambda lines: [lines[0], *lines[2:]], 2, "lines are missing or were moved"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2, "lines are missing or were moved"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3, "lines are missing or were moved"),
        (lambda lines: lines[1:], 1, "hash is wrong"),
        (lambda lines: [], 1, "empty"),
    ],
    ids=["missing", "moved", "repeated", "no-opening", "emptied"],
)
def test_lines_that_are_missing_or_moved_are_named(sound: Path, tmp_path: Path, change: Any, line: int, found: str):
    path = altered_lines(sound, tmp_path / "log", change)
    with pytest.raises(BadInput, match=found) as caught:
        verify(tmp_path / "log")
    assert caught.value.where == f"{path}:{line}"


def test_a_record_that_was_rewritten_with_its_hash_breaks_the_next(sound: Path, tmp_path: Path):
    def forge(lines: Sequence[bytes]) -> Sequence[bytes]:
        previous = json.loads(lines[0])["hash"]
        body = lines[1].rpartition(b',"hash"')[0].replace(b'"num_tokens":3', b'"num_tokens":4')
        assert body not in lines[1]
        digest = hmac.digest(b"", previous.encode() + b"\n" + body, "sha256").hex()
        return [lines[0], body + f',"hash":"{digest}"}}\n'.encode(), *lines[2:]]

    path = altered_lines(sound, tmp_path / "log", forge)
    with pytest.raises(BadInput, match="this line was altered, one before it is missing") as caught:
        verify(tmp_path / "log")
    assert caught.value.where == f"{path}:3"


def test_files_that_are_missing_or_renamed_are_named(sound: Path, tmp_path: Path):
    for change in ("missing", "renamed"):
        folder = Path(shutil.copytree(sound, tmp_path / change))
        first, second, *_ = files(folder)
        if change == "missing":
            second.unlink()
        else:
            other = first.rename(folder / "held")
            second.rename(first)
            other.rename(second)
        with pytest.raises(BadInput):
            verify(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_after_a_crash_the_chain_goes_on_behind_the_last_whole_line(sound: Path, tmp_path: Path, cut: int):
    """A process that was killed may leave any beginning of its last file."""
    shutil.rmtree(tmp_path / "log", ignore_errors=True)
    folder = Path(shutil.copytree(sound, tmp_path / "log"))
    last = files(folder)[-1]
    content = last.read_bytes()
    last.write_bytes(content[: cut % (len(content) + 1)])
    kept = max(0, last.read_bytes().count(b"\n") - 1)
    before = sum(path.read_bytes().count(b"\n") - 1 for path in files(folder)[:-1])
    write(folder, 3, keep_files=0)
    assert verify(folder).num_records == before + kept + 3


def test_a_start_refuses_a_log_that_was_altered(sound: Path, tmp_path: Path):
    folder = Path(shutil.copytree(sound, tmp_path / "log"))
    last = files(folder)[-1]
    content = last.read_bytes().replace(b'"request_id":"r', b'"request_id":"x')
    last.write_bytes(content + b'{"seq":9')
    with pytest.raises(BadInput, match="hash is wrong"):
        AuditLog(folder, AuditSettings(), "replica")
    assert last.read_bytes() == content + b'{"seq":9', "the evidence is left as it was"


def test_a_disk_that_is_full_closes_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = AuditLog(tmp_path, AuditSettings(), "replica")
    log.append(records(2))

    class Full:
        closed = False

        def write(self, content: memoryview) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(log, "_file", Full())
    with pytest.raises(OSError, match="No space left"):
        log.append(records(1))
    log.close()
    write(tmp_path, 3)
    assert verify(tmp_path).num_records == 5


def test_after_a_disk_error_the_log_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder that is away for a while, as a full disk would be."""
    monkeypatch.setattr(application, "_AUDIT_PAUSE_S", 0.05)
    lost: list[int] = []
    opened: list[AuditLog] = []

    def open_log() -> AuditLog:
        opened.append(AuditLog(tmp_path / "log", AuditSettings(), "replica"))
        return opened[-1]

    async def main() -> None:
        queue = AuditQueue(open_log, lost.append)
        queue.put(records(3))
        await queue.close()
        opened[-1].close()
        for _ in range(2):  # the second does not even try
            queue.put(records(2))
            assert queue._writing is not None
            await queue._writing
        await asyncio.sleep(0.06)
        queue.put(records(4, 3))
        await queue.close()
        assert queue.head.records == 7

    asyncio.run(main())
    assert lost == [2, 2]
    assert verify(tmp_path / "log").num_records == 7


def test_what_waits_for_the_disk_is_bounded_by_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waiting = records(2)
    monkeypatch.setattr(application, "_MOST_AUDIT_TOKENS", 2 * sum(len(each.token_ids) for each in waiting))
    lost: list[int] = []

    async def main() -> None:
        queue = AuditQueue(lambda: AuditLog(tmp_path / "log", AuditSettings(), "replica"), lost.append)
        for _ in range(5):  # nothing is written before the loop goes on
            queue.put(waiting)
        await queue.close()
        assert queue.head.records == 6

    asyncio.run(main())
    assert lost == [2, 2]


KEY = b"a key of thirty-two random bytes"


def keyed(folder: Path, count: int, **chosen: Any) -> list[Head]:
    """A log with a key, and its heads after each write."""
    path = folder.parent / "key"
    path.write_bytes(KEY + b"\n")
    heads = []
    with AuditLog(folder, AuditSettings(key_file=str(path), **chosen), "replica") as log:
        heads.append(log.head)
        for number in range(count):
            log.append(records(1, number))
            heads.append(log.head)
    return heads


def test_without_the_key_nobody_writes_a_line_or_tries_texts(tmp_path: Path):
    keyed(tmp_path / "log", 9, max_bytes=600, keep_files=2)
    assert verify(tmp_path / "log", KEY).writers[0].first_seq > 0
    for other in (b"", b"another key of thirty-two bytes!"):
        with pytest.raises(BadInput, match="or the key is another one"):
            verify(tmp_path / "log", other)
    [*_, (_, record)] = verified_records(tmp_path / "log", KEY)
    assert record.text_hash == text_hash([8, 7, 2**31], KEY) != text_hash([8, 7, 2**31])
    anchor = tmp_path / "log" / "replica.anchor.json"
    anchor.write_bytes(anchor.read_bytes().replace(b'"first_seq":', b'"first_seq":1'))
    with pytest.raises(BadInput, match=r"anchor\.json:1"):
        verify(tmp_path / "log", KEY)


def test_a_key_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "key").write_text("short")
    for name in ("key", "none"):
        with pytest.raises(BadInput, match=r"audit\.key_file"):
            AuditLog(tmp_path, AuditSettings(key_file=str(tmp_path / name)), "replica")


def test_what_is_not_there_any_more_is_missed_by_the_heads_that_were_noted(tmp_path: Path):
    log = tmp_path / "log"
    heads = keyed(log, 12, max_bytes=900)
    for head in heads:
        verify(log, KEY, [head])
    for what in ("tail", "last file", "chain", "rewritten"):
        folder = Path(shutil.copytree(log, tmp_path / what))
        last = files(folder)[-1]
        if what == "tail":
            last.write_bytes(b"".join(last.read_bytes().splitlines(keepends=True)[:-1]))
        elif what == "last file":
            last.unlink()
        else:
            shutil.rmtree(folder)
            keyed(folder, 12 if what == "rewritten" else 0)
            if what == "chain":
                for path in files(folder):
                    path.rename(folder / path.name.replace("replica", "other"))
                (folder / "other.lock").touch()
        with pytest.raises(BadInput):
            verify(folder, KEY, heads[-1:])
    # What is deleted as the settings ask cannot be compared, what came after it is.
    kept = tmp_path / "kept"
    heads = keyed(kept, 12, max_bytes=900, keep_files=1)
    verify(kept, KEY, heads)


def test_a_score_that_is_none_closes_the_log_and_leaves_it_whole(tmp_path: Path):
    log = AuditLog(tmp_path, AuditSettings(), "replica")
    log.append(records(2))
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append([*records(1), AuditRecord("r", "main", "v1", [1], False, float("nan"), True)])
    with pytest.raises(ValueError, match="closed"):
        log.append(records(1))
    write(tmp_path, 3)
    assert verify(tmp_path).num_records == 5


def test_what_a_start_left_behind_half_written_is_no_chain(tmp_path: Path):
    """A disk that was full leaves an empty file of each attempt; nobody cleans up after a replica that is gone."""
    with AuditLog(tmp_path, AuditSettings(), "replica") as log:
        log.append(records(3))
    (tmp_path / ".replica-000002.jsonl").touch()
    assert verify(tmp_path).num_records == 3


def test_a_folder_without_a_log_is_no_log(tmp_path: Path):
    with pytest.raises(BadInput, match="no file of an audit log"):
        verify(tmp_path)


TEXTS = ["I think the movie was good from start to end.", "The music was bad.", "A story about a book that was dull"]
CHAT = ({"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "moving in every way"})


@pytest.fixture(scope="module")
def scorer(tiny: Path) -> RewardScorer:
    return RewardScorer(RewardSettings(model=str(tiny / "reward_model"), batch_invariant=True))


def served(scorer: RewardScorer, folder: Path, kept: str) -> None:
    """What a service would have logged: each text scored in company of its own."""
    encoded = [scorer.texts.encode(text)[0] for text in TEXTS] + [scorer.texts.encode_messages(CHAT)[0]]
    with AuditLog(folder, AuditSettings(texts=kept), "replica") as log:
        for index, token_ids in enumerate(encoded):
            score = scorer.score_tokens([token_ids, *encoded[:index]]).scores[0]
            log.append([AuditRecord(f"r{index}", "main", scorer.version, token_ids, False, float(score), True)])


def test_scores_are_replayed_to_the_bit(scorer: RewardScorer, tmp_path: Path):
    served(scorer, tmp_path / "full", "full")
    report = replay(tmp_path / "full", {scorer.version: scorer})
    assert (report.num_equal, report.exact) == (4, True)


def test_a_replay_of_nothing_is_no_success(scorer: RewardScorer, tmp_path: Path):
    with pytest.raises(BadInput, match="no record"):
        replay(tmp_path, {scorer.version: scorer})
    write(tmp_path, 0)
    with pytest.raises(BadInput, match="no record"):
        replay(tmp_path, {scorer.version: scorer})


def test_hashed_texts_are_found_by_the_texts_of_the_owner(scorer: RewardScorer, tmp_path: Path):
    served(scorer, tmp_path / "log", "hash")
    texts = tmp_path / "texts.jsonl"
    rows: list[dict[str, Any]] = [{"text": text} for text in reversed(TEXTS[1:])] + [{"messages": list(CHAT)}]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = replay(tmp_path / "log", {scorer.version: scorer}, texts=str(texts))
    assert report.num_equal == 3
    assert [(each.request_id, each.cause) for each in report.not_replayed] == [("r0", "the text is not known")]
    assert not report.exact
    texts.write_text('{"text": 3}\n')
    with pytest.raises(BadInput, match=r"texts\.jsonl:1"):
        replay(tmp_path / "log", {scorer.version: scorer}, texts=str(texts))


def test_a_score_that_differs_in_the_last_bit_is_reported(scorer: RewardScorer, tmp_path: Path):
    token_ids = scorer.texts.encode(TEXTS[0])[0]
    score = float(scorer.score_tokens([token_ids]).scores[0])
    other = float(np.nextafter(score, np.inf))
    with AuditLog(tmp_path, AuditSettings(texts="full"), "replica") as log:
        log.append([AuditRecord("r0", "main", scorer.version, token_ids, False, other, True, "trainer")])
        log.append([AuditRecord("r1", "main", "gone", token_ids, False, score, True, "reporter")])
        log.append([AuditRecord("r2", "main", scorer.version, token_ids, False, score, False)])
    report = replay(tmp_path, {scorer.version: scorer})
    [difference] = report.differences
    assert (difference.logged, difference.replayed, difference.request_id) == (other, score, "r0")
    assert difference.place.endswith(".jsonl:2")
    assert (difference.caller, *(each.caller for each in report.not_replayed)) == ("trainer", "reporter", None)
    gone, other_mode = (each.cause for each in report.not_replayed)
    assert gone == "no model of version gone"
    assert "batch_invariant false" in other_mode


def test_the_hash_is_of_the_ids_and_not_of_their_type():
    ids = [1, 2, 70000]
    assert text_hash(ids) == text_hash(np.array(ids, dtype=np.int64)) == text_hash(tuple(ids))
