"""HTTP over one home: the API, the bytes of every version, the metrics, the pages, and uploads of experts.

    app.py            which address is answered by what
    hub/              the same for clients of the Hugging Face Hub
    oci/              the same for clients of OCI registries
    read_routes.py    what is read: heads, versions, files, experts, how the daemon is
    upload_routes.py  experts that are sent to us
    answers.py        what every answer shares: JSON problems, entity tags, preconditions, caching, security headers
    files.py          the manifest and the files of one published version
    ranges.py         which bytes a Range header asks for
    sending.py        one file as an answer: whole, in parts, or not at all
    waiting.py        clients that wait for a version
    computing.py      experts' own models, computed while they are sent
    hosts.py          by which names it may be asked
    forwarded.py      what a proxy in front says
    measuring.py      requests and answers, counted
    finding.py        which expert an address means
    drops.py          what became of a drop, by its name
    rows.py           records of the registry as JSON
    pages/            the pages
    events.py         what goes on, as server-sent events
    connections.py    how many there may be, and how long one may keep us waiting
    server.py         the socket and the thread

Nothing here loads a tensor: `mainstem serve` starts without torch.
"""

from daemon.http.app import create_app
from daemon.http.server import HttpServer, base_url

__all__ = ["HttpServer", "base_url", "create_app"]
