"""The servers that a stage needs beside it: started on this machine, or reached by URL."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig, ServerSection
from megatron_r1reward.rollout.server import VllmServer, start_servers

log = logging.getLogger(__name__)
