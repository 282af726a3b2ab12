"""What does a crawl hold?  One record of a WARC file, written by hand."""


def warc_record(kind: str, content_type: str, body: bytes, http: bool) -> bytes:
    payload = body
    if http:
        payload = b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n" + body
    outer = "application/http; msgtype=response" if http else content_type
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Target-URI: http://example.org/\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: {outer}\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload + b"\r\n\r\n"
