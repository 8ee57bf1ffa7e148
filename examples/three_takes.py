"""Has a prompt continued three times, and goes on from the first: python three_takes.py IN FOLDER [URL]

IN is any recording. FOLDER gets take-1.wav to take-3.wav and, where the server runs with --allow-save, talk.session,
with which the conversation goes on when this is run again. It needs the package: `pip install -e .`.
"""

import asyncio
import os
import sys
from pathlib import Path

from streaming.audio import WavWriter, read_audio
from streaming.client.client import Audio, ContinuationClient
from streaming.errors import StreamingError
from streaming.files import write_private
from streaming.protocol.messages import Error, SessionStart, TakeKept, TurnDone


async def until(client: ContinuationClient, ending: type, output: WavWriter | None = None) -> None:
    """Write what the server says, until it says this."""
    async for event in client.events():
        if isinstance(event, Audio) and output is not None:
            output.write(event.pcm)
        elif isinstance(event, Error):
            sys.exit(f"{event.code}: {event.message}")
        elif isinstance(event, ending):
            return


async def main(source: str, target: str, url: str = "ws://127.0.0.1:8765") -> None:
    speech, folder = read_audio(source), Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    talk = folder / "talk.session"
    saved = talk.read_bytes() if talk.exists() else b""
    start, token = SessionStart(pace="fast", max_seconds=5, takes=True), os.environ.get("STREAMING_TOKEN")
    async with ContinuationClient.connect(url, start, token=token, saved=saved) as client:
        if client.started.takes < 3:
            sys.exit(f"The server keeps {client.started.takes} takes; it has to run with `--takes 3` or more.")
        await client.send(speech)
        first = await client.speak()
        for number in (1, 2, 3):
            if number > 1:
                await client.take(first)
            with WavWriter(folder / f"take-{number}.wav") as output:
                await until(client, TurnDone, output)
        await client.keep(first)
        await until(client, TakeKept)
        if client.started.saves:
            write_private(talk, await client.save())  # it holds a voice
    kept = f"the conversation is in {talk}" if client.started.saves else "this server saves no conversations"
    print(f"Three takes of turn {first} are in {folder}; {kept}.")


if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
try:
    asyncio.run(main(*sys.argv[1:]))
except (StreamingError, OSError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit("Stopped.")
