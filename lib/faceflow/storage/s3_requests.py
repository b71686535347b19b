"""Requests to S3 that s3fs has no name for: conditional puts, unfinished uploads."""

from __future__ import annotations

from typing import Any


def bucket_and_key(address: str) -> tuple[str, str]:
    bucket, _, key = address[len("s3://") :].partition("/")
    return bucket, key


def put_if(fs: Any, address: str, data: bytes, expected: str | None) -> str | None:
    """Put an object if its ETag is still `expected` (None: it must not exist); returns its new ETag, or None where the
    condition does not hold."""
    bucket, key = bucket_and_key(address)
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    try:
        return str(fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
    except Exception as error:
        if not _is_precondition_failure(error):
            raise
        return None


def etag(fs: Any, address: str) -> str:
    """The ETag of an object. Raises FileNotFoundError where there is none."""
    bucket, key = bucket_and_key(address)
    return str(fs.call_s3("head_object", Bucket=bucket, Key=key)["ETag"])


def abort_uploads(fs: Any, prefix: str, older_than: float) -> int:
    """Abort uploads below an address that were begun before `older_than` (Unix time) and never completed; returns how many."""
    bucket, key = bucket_and_key(prefix)
    removed, more = 0, dict[str, str]()
    while True:
        listed = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key, **more)
        for upload in listed.get("Uploads") or []:
            if upload["Initiated"].timestamp() < older_than:
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                removed += 1
        if not listed.get("IsTruncated"):
            return removed
        more = {"KeyMarker": listed["NextKeyMarker"], "UploadIdMarker": listed["NextUploadIdMarker"]}


def _is_precondition_failure(error: BaseException | None) -> bool:
    while error is not None:
        code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409") or "PreconditionFailed" in str(error):
            return True
        error = error.__cause__
    return False
