"""Pictures of faces for the report: addresses, or small pictures embedded in the page."""

from __future__ import annotations

import base64
import io
from urllib.parse import quote, urlsplit

from faceflow.storage.object_store import Store

THUMBNAIL_PIXELS = 132
"""Twice what the page shows, for screens of two pixels a point."""

LARGEST_IMAGE_BYTES = 64 * 2**20
"""A larger file is no photo; it is not opened."""


def picture(face_id: str, thumbnails: str | None) -> str | None:
    """What the page shows of a face: an address, or the picture itself where it lies on a disk; None where there is none."""
    if thumbnails is None:
        return None
    if urlsplit(thumbnails).scheme in ("http", "https"):
        return thumbnails.replace("{id}", quote(face_id, safe=""))
    # An id comes from outside: it may name a file below the folder, and none elsewhere.
    if ".." in face_id.split("/") or face_id.startswith("/") or "\0" in face_id:
        return None
    return _embedded(thumbnails.removeprefix("file://").replace("{id}", face_id))


def _embedded(path: str) -> str | None:
    from PIL import Image, ImageOps

    try:
        store = Store.at(path)
        if (store.size("") or LARGEST_IMAGE_BYTES) >= LARGEST_IMAGE_BYTES:
            return None
        with Image.open(io.BytesIO(store.read_bytes(""))) as image:
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def image_sources(thumbnails: str | None) -> str:
    """The one origin that pictures may come from."""
    parts = urlsplit(thumbnails or "")
    return f" {parts.scheme}://{parts.netloc}" if parts.scheme in ("http", "https") else ""
