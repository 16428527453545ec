"""Functions for any downloader: httpx, requests, urllib; they need no crawl, no reactor and no Scrapy.

Adopt one step after the other: decide what to request, write the bytes, publish them, record the job; or use
``download``, which does all of it. A function that is off by a flag in the environment
(``SCRAPY_STREAMING_ENABLED`` …), or needs a library that is not installed, returns ``None`` or ``False``.
No error is hidden: a wrong argument raises ``TypeError``, a refused response its named error, unless the
caller passed ``fallback=True``.
"""

from __future__ import annotations

from scrapy_streaming.integration.deciding import try_streaming_resume_decision
from scrapy_streaming.integration.downloading import download
from scrapy_streaming.integration.jobs import (
    acquire_or_reuse_job,
    check_database_health,
    complete_job,
    generate_job_key,
    generate_operation_key,
    get_streaming_database,
    run_effect,
)
from scrapy_streaming.integration.publishing import try_streaming_finalization
from scrapy_streaming.integration.switches import (
    fallback_counts,
    idempotency_enabled,
    integration_status,
    log_integration_status,
    schema_enabled,
    streaming_enabled,
    use_streaming_for_finalization,
    use_streaming_for_io,
    use_streaming_for_resume,
)
from scrapy_streaming.integration.values import FinalizedArtifact, ResumeDecision, StreamMetrics
from scrapy_streaming.integration.writing import try_streaming_io

__all__ = [
    "FinalizedArtifact",
    "ResumeDecision",
    "StreamMetrics",
    "acquire_or_reuse_job",
    "check_database_health",
    "complete_job",
    "download",
    "fallback_counts",
    "generate_job_key",
    "generate_operation_key",
    "get_streaming_database",
    "idempotency_enabled",
    "integration_status",
    "log_integration_status",
    "run_effect",
    "schema_enabled",
    "streaming_enabled",
    "try_streaming_finalization",
    "try_streaming_io",
    "try_streaming_resume_decision",
    "use_streaming_for_finalization",
    "use_streaming_for_io",
    "use_streaming_for_resume",
]
