"""Registry of storages by URL scheme. Packages add one by the entry point group lampctl.storages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.registry import Registry

if TYPE_CHECKING:
    from pipeline.rundir.storage.base import Storage

LOCAL = "local"  # a folder: a place without a scheme

STORAGES: Registry[type[Storage]] = Registry(
    "storage",
    {
        LOCAL: "pipeline.rundir.storage.local:FolderStorage",
        "s3": "pipeline.rundir.storage.bucket:BucketStorage",
        "gs": "pipeline.rundir.storage.bucket:BucketStorage",
        "az": "pipeline.rundir.storage.bucket:BucketStorage",
    },
)
