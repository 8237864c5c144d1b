"""An update of an engine's servers: repeated where that may help. Of several servers, a silent one misses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from opd.engines.capabilities import RECOGNISED_S
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, Connection
from opd.engines.vllm import models_in
from opd.errors import TrainingError

T = TypeVar("T")


def updated(
    replicas: Replicas,
    send: Callable[[Connection], Answer[T]],
    *,
    first: bool,
    refused: Callable[[str, str | None], TrainingError],
) -> dict[str, T]:
    """What every server says that has taken the update. The caller leaves out the others until a later update.

    A server that gives no answer at all misses the update, unless it is the `first` one or no other server answers.

    Raises:
        TrainingError: `refused(address, reason)`, for another failure, and if no server answers.
    """
    found = replicas.each(send, wait_s=replicas.patience_s, among=_there(replicas))
    taken = {url: answer.value for url, answer in found.items() if answer.value is not None}
    for url, answer in found.items():
        if answer.value is None and (first or not answer.lost or not taken):
            raise refused(url, answer.failure)
    replicas.counts.add(servers_lost=len(replicas.servers) - len(taken))
    return taken


def remove_others(folder: Path) -> None:
    """Remove the folders of other versions beside this one."""
    for old in folder.parent.glob("version-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def _there(replicas: Replicas) -> set[str]:
    """The servers to update: all but those that the last update left out and that are still silent."""
    urls = {one.url for one in replicas.servers}
    if not replicas.left_out:
        return urls
    found = replicas.each(lambda one: one.get("v1/models", models_in), RECOGNISED_S, among=replicas.left_out)
    return urls - {url for url, answer in found.items() if answer.value is None}
