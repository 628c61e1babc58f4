"""The client: everything a person or a program does with the service, over gRPC alone.

`aio.DarkroomClient` for asyncio, `sync.DarkroomClient` with the same methods for everybody else, and the
`darkroom` command. It imports neither ray, torch, asyncpg nor pydantic, and nothing of the server.

    from scheduler.client.sync import DarkroomClient

    with DarkroomClient("127.0.0.1:7443", key) as client:
        handle = client.imagine("a lighthouse in the rain")
        job = handle.result()
        files = handle.save(Path("pictures"))
"""
