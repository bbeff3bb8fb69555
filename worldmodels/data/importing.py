"""Fill a store with a log that somebody else recorded: in its order, and from where an earlier import was left.

Episodes go straight into segments. A segment is committed by the rename of its folder, so that a killed import loses
what was not committed yet and nothing else. Where to go on is read from the store itself: the `info` of every episode
names the part of the log that it came from, and its number there. Several processes write whole segments, each of its
own range of parts; this one commits them in the order of the log.
"""

import hashlib
import json
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from worldmodels.data.card import Card, check_episode
from worldmodels.data.collecting import summary
from worldmodels.data.disk import disk_errors, read_json, remove, write_json
from worldmodels.data.segments import SegmentWriter, describe, read_attributes
from worldmodels.data.store import SEGMENT_FRAMES, Store
from worldmodels.types import Episode, UserError

Read = Callable[..., Iterator[Episode]]
"""read(part=...): the episodes of one part of the log, always the same ones in the same order."""
_RANGES = 64  # at most, that the parts are divided into for several processes: each of them ends a segment


class Progress(NamedTuple):
    """How many parts of the log are done, and how many episodes and frames there are of them."""

    parts: int = 0
    episodes: int = 0
    frames: int = 0


class _Made(NamedTuple):
    """A segment that is whole but not committed."""

    path: Path
    rows: int


class _Range(NamedTuple):
    """Parts `start` to `stop`; `stored` are length and return of those episodes of the first that the store has."""

    start: int
    stop: int
    stored: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class _Log:
    """What it takes to write segments of a log: how it is read, and where to. All segments bear the mark."""

    read: Read
    parts: Sequence[str]
    card: Card
    folder: Path
    mark: str
    rows: int  # of a segment, about


def import_log(
    path: Path,
    card: Card,
    parts: Sequence[str],
    read: Read,
    limit: int | None = None,
    processes: int = 1,
    progress: Callable[[Progress], None] = lambda done: None,
) -> dict[str, Any]:
    """Add the episodes of a log to the store at `path`, until it holds all of them or at least `limit` steps.

    Args:
        path: folder of the store, made where there is none.
        card: dataset card of the log; a store that is there must have been begun with the same card and parts.
        parts: names of the parts of the log, in order.
        read: called as `read(part=...)`; for several processes it must be picklable.
        limit: least number of steps; the episode that reaches it is stored whole.
        processes: that read parts at the same time; the episodes and their order do not depend on it.
        progress: called with what is done so far, first with what the store holds.

    Returns:
        The figures of `summary`; `parts`, how many the log has; `complete`, whether all of it is stored; and the
        `seconds` of this run. They are also in `path`/metrics.json; those there where nothing was left to do.

    Raises:
        UserError: the log is malformed, the store is of another log, or the disk refuses. Segments that were committed
            stay; a store without any is removed again.
    """
    began, metrics, existed = time.monotonic(), path / "metrics.json", path.exists()
    mark = hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
    begun = any(path.glob("sources/*.json"))
    with Store.open(path, write=True) if begun else Store.create(path, card) as store:
        _same_log(path, store.card, card)
        steps = int(store.lengths.sum())
        if steps and [read_attributes(p).get("parts_sha256") for p in store.sealed[:1]] != [mark]:
            raise UserError(
                f"the log has other parts than when its import into {path.absolute()} began: give another store=, or "
                "the log as it was then"
            )
        figures = read_json(metrics) if metrics.exists() else {}
        if figures.get("steps") == steps and (figures.get("complete") or (limit is not None and steps >= limit)):
            return figures
        log = _Log(read, parts, card, store.segments, mark, SEGMENT_FRAMES)
        try:
            complete = _fill(store, log, math.inf if limit is None else limit, processes, progress)
            if not len(store.lengths):
                raise UserError(f"there is nothing to import into {path.absolute()}: the log holds no episodes")
        except BaseException as e:
            store.refresh()  # interrupted between the rename that commits a segment and taking note of it
            if not len(store.lengths):
                _undo(path, existed)
            elif isinstance(e, UserError):
                kept = f"the {store.lengths.sum()} steps in {path.absolute()} are kept, and need not be read again"
                raise UserError(f"{e}; {kept}") from e
            raise
        figures = summary(store) | {"parts": len(parts), "complete": complete}
        figures["seconds"] = round(time.monotonic() - began, 1)
    with disk_errors(path):
        write_json(metrics, figures, checksum=True)
    return figures


def _same_log(path: Path, have: Card, card: Card) -> None:
    for name, value in card.items():
        if name != "versions" and have.get(name) != value:
            raise UserError(
                f"the store {path.absolute()} was begun with {name}={have.get(name)!r} and cannot go on with "
                f"{value!r}: give another store=, or the log and the settings that it was begun with"
            )


def _undo(path: Path, existed: bool) -> None:
    """Take away a store without episodes, as it is left by an import that failed early."""
    for name in ("segments", "staging", "sources", "store.json"):
        remove(path / name)
    if not existed:
        with suppress(OSError):  # something else lies there by now
            path.rmdir()


def _fill(store: Store, log: _Log, limit: float, processes: int, progress: Callable[[Progress], None]) -> bool:
    """Write what is missing; returns whether the whole log is stored then."""

    def made(events: Iterator[Progress | _Made]) -> Iterator[_Made]:
        done = Progress(_left(store, log).start, len(store.lengths), int(store.lengths.sum()))
        progress(done)
        for event in events:
            if isinstance(event, _Made):
                yield event
            else:
                done = Progress(*map(sum, zip(done, event, strict=True)))
                progress(done)

    left, todo = limit - int(store.lengths.sum()), _left(store, log)
    try:
        processes = min(processes, todo.stop - todo.start)
        if processes > 1 and left > processes * log.rows:
            with closing(_in_parallel(log, todo, processes)) as events:
                for segment in made(events):
                    if segment.rows > left:
                        break  # the rest is for one process, which stops at the episode that reaches the limit
                    store.commit(segment.path)
                    left -= segment.rows
                else:
                    return True
        if left > 0:
            with closing(_write(log, _left(store, log), left)) as events:
                for segment in made(events):
                    store.commit(segment.path)
                    left -= segment.rows
        return left > 0
    finally:
        for unused in log.folder.glob("*.tmp"):
            with suppress(OSError):  # the disk's own error, if there is one, is what to tell
                remove(unused)


def _left(store: Store, log: _Log) -> _Range:
    """What of the log is not in the store."""
    count, stored = len(store.lengths), []
    part = store.episode_info(count - 1)["info"]["part"] if count else log.parts[0] if log.parts else None
    for i in reversed(range(count)):
        episode = store.episode_info(i)
        if episode["info"]["part"] != part:
            break
        stored.append((episode["length"], episode["return"]))
    return _Range(log.parts.index(part) if part else 0, len(log.parts), stored[::-1])


def _episodes(log: _Log, todo: _Range) -> Iterator[tuple[int, Episode]]:
    """Number of the part and episode, for those that are not stored."""
    for number in range(todo.start, todo.stop):
        part, index = log.parts[number], -1
        stored = todo.stored if number == todo.start else ()
        for index, episode in enumerate(log.read(part=part)):
            check_episode(log.card, episode, f"episode {index} of {part}")
            if index >= len(stored):
                yield number, replace(episode, info={**episode.info, "part": part, "index": index})
            elif stored[index] != (len(episode), describe("", episode)["return"]):
                raise UserError(f"the log has changed since its import began: episode {index} of {part} is another one")
        if index + 1 < len(stored):
            raise UserError(f"the log has changed since its import began: {part} has fewer episodes")


def _write(log: _Log, todo: _Range, steps: float = math.inf) -> Generator[Progress | _Made, None, None]:
    """Write segments of the parts `todo`, until they hold at least `steps` steps."""
    at, episodes = todo.start, _episodes(log, todo)
    for begin in episodes:
        with disk_errors(log.folder), SegmentWriter(log.folder, log.card["source"], parts_sha256=log.mark) as writer:
            for number, episode in chain([begin], episodes):
                writer.append(f"{episode.info['part']}/{episode.info['index']}", episode)
                steps -= len(episode)
                yield Progress(number - at, 1, len(episode))
                at = number
                if writer.rows >= log.rows or steps <= 0:
                    break
            writer.finish()
        yield _Made(writer.path, writer.rows)
        if steps <= 0:
            return
    yield Progress(todo.stop - at)


def _in_parallel(log: _Log, todo: _Range, processes: int) -> Generator[Progress | _Made, None, None]:
    """As `_write`, by several processes: segments come in the order of the log, progress as it is made.

    A process starts from a server without threads, as a fork of this one would be unsafe with the libraries that read
    logs. It hands over what it has done through a pipe of its own and nothing else: it can be ended at any moment, and
    ends by itself when this process is killed.
    """
    count = min(_RANGES, todo.stop - todo.start)
    bounds = [todo.start + (todo.stop - todo.start) * k // count for k in range(count + 1)]
    ranges = [_Range(a, b, todo.stored if a == todo.start else ()) for a, b in pairwise(bounds)]
    waiting = deque(range(count))
    results: list[deque[_Made | UserError | None]] = [deque() for _ in ranges]  # None: the range is done
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, int] = {}
    turn = 0
    try:
        for _ in range(processes):
            pipe, theirs = context.Pipe()
            workers[pipe] = context.Process(target=_work, args=(theirs, log), daemon=True)
            workers[pipe].start()
            theirs.close()
            busy[pipe] = waiting.popleft()
            pipe.send(ranges[busy[pipe]])
        while turn < count:
            ready = set(wait(list(busy)))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                try:
                    event = pipe.recv()
                except (EOFError, ConnectionError):
                    raise _lost(workers[pipe]) from None
                if isinstance(event, Progress):
                    yield event
                    continue
                results[busy[pipe]].append(event)
                if isinstance(event, _Made):
                    continue
                del busy[pipe]
                if isinstance(event, UserError):
                    waiting.clear()
                elif waiting:
                    busy[pipe] = waiting.popleft()
                    pipe.send(ranges[busy[pipe]])
            while turn < count and results[turn]:
                result = results[turn].popleft()
                if isinstance(result, UserError):
                    raise result
                if result is None:
                    turn += 1
                else:
                    yield result
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _work(pipe: Connection, log: _Log) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            todo = pipe.recv()
            try:
                for event in _write(log, todo):
                    pipe.send(event)
                pipe.send(None)
            except UserError as error:
                pipe.send(error)


def _lost(worker: BaseProcess) -> Exception:
    worker.join()
    code = worker.exitcode or 0
    if code >= 0:
        return RuntimeError("a process that read the log failed; its traceback is above")
    return UserError(
        f"a process that read the log was killed by signal {-code}, perhaps for want of memory: run the "
        "same command again, with processes=1 where it was memory"
    )
