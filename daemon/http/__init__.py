"""HTTP over one home, read-only: the API, the bytes of every version, the metrics and the status page.

    answers.py   what every answer shares: JSON problems, entity tags, caching, security headers
    files.py     the manifest and the files of one published version
    app.py       the routes
    page.py      the status page
    server.py    the socket and the thread

Nothing here loads a tensor: `mainstem serve` starts without torch.
"""

from daemon.http.app import create_app
from daemon.http.server import HttpServer, base_url

__all__ = ["HttpServer", "base_url", "create_app"]
