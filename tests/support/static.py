"""``python static.py KIND FOLDER PORT`` serves a folder as a Python package does it with no options.

What may live here: one function for each package that serves files, named as the kind.
"""

from __future__ import annotations

import asyncio
import sys


def aiohttp(folder: str, port: int) -> None:
    from aiohttp import web

    app = web.Application()
    app.router.add_static("/", folder)
    web.run_app(app, host="127.0.0.1", port=port)


def starlette(folder: str, port: int) -> None:
    import uvicorn
    from starlette.staticfiles import StaticFiles

    uvicorn.run(StaticFiles(directory=folder), host="127.0.0.1", port=port, log_level="warning")


def tornado(folder: str, port: int) -> None:
    from tornado.web import Application, StaticFileHandler

    async def serve() -> None:
        Application([("/(.*)", StaticFileHandler, {"path": folder})]).listen(port, "127.0.0.1")
        await asyncio.Event().wait()

    asyncio.run(serve())


def twisted(folder: str, port: int) -> None:
    from twisted.internet import reactor
    from twisted.web.server import Site
    from twisted.web.static import File

    reactor.listenTCP(port, Site(File(folder)), interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
