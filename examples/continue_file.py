"""Sends a WAV file (24 kHz, mono, 16 bits), keeps its continuation: python continue_file.py IN.wav OUT.wav [URL]"""

import asyncio
import json
import os
import struct
import sys
import wave

from websockets.asyncio.client import connect  # pip install websockets

HEADER = struct.Struct("<BBHIQ")  # kind (1: 16-bit PCM), flags, reserved, turn, position in samples
RUN = "no server there, start `python server.py`: "


async def main(source: str, target: str, url: str = "ws://127.0.0.1:8765/v1/continue") -> None:
    with wave.open(source) as file:
        if file.getparams()[:3] != (1, 2, 24_000):
            sys.exit(f"{source} must be mono, 16 bits, 24 kHz")
        speech, spoken, token = file.readframes(file.getnframes()), b"", os.environ.get("STREAMING_TOKEN")
    async with connect(url, additional_headers={"Authorization": f"Bearer {token}"} if token else None) as socket:
        await socket.send(json.dumps({"type": "session.start", "pace": "fast", "max_seconds": 5}))
        for at in range(0, len(speech), 96_000):  # at most two seconds a message
            await socket.send(HEADER.pack(1, 0, 0, 1, at // 2) + speech[at : at + 96_000])
        await socket.send(json.dumps({"type": "speak", "turn": 1}))
        async for data in socket:
            if isinstance(data, bytes):
                spoken += data[HEADER.size :]
            elif (said := json.loads(data))["type"] in ("error", "session.refused"):
                sys.exit(f"{said['code']}: {said['message']}")
            elif said["type"] == "turn.done":
                break
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes(spoken)


sys.excepthook = lambda kind, error, _: print(RUN * issubclass(kind, ConnectionError) + str(error), file=sys.stderr)
sys.exit(__doc__ if len(sys.argv) < 3 else asyncio.run(main(*sys.argv[1:])))
