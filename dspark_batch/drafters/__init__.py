"""Drafters: methods of proposing a block; each builds one draft graph with the same contract."""

from __future__ import annotations

DRAFTERS = {"dspark": "dspark_batch.drafters.dspark", "dflash": "dspark_batch.drafters.dspark"}
