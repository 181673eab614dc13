"""Whether a request that changes the server may come from where it comes from.

A browser sends any page's forms and text to any server that it reaches, this one on the user's own
machine too. What it does not send without asking first is JSON that says so, nor does it hide whose
page it is.
"""

from urllib.parse import urlsplit

from starlette.requests import Request

from app.http.errors import ContentTypeError, ForeignRequestError

JSON = "application/json"


def check_origin(request: Request) -> None:
    """Let pass what is JSON by its header and not of another site's page.

    Raises:
        ContentTypeError, ForeignRequestError: otherwise.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != JSON:
        raise ContentTypeError(
            f"the Content-Type is {content_type[:100]!r}; this route takes {JSON} alone"
        )
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != _host(request):
        raise ForeignRequestError(
            f"a page of {origin[:100]} may not change this server, which is {_host(request)[:100]}"
        )


def _host(request: Request) -> str:
    return request.headers.get("host", "").lower()
