"""LiveKit's plugin: interrupts a reply, truncates it to what was heard, and has another."""

import asyncio
import json
import wave

from livekit import rtc
from livekit.agents.utils import http_context
from livekit.plugins import openai

HEARD_MS = 330


async def main() -> None:
    with wave.open("examples/prompt.wav") as file:
        speech = file.readframes(file.getnframes())
    model = openai.realtime.RealtimeModel(base_url="ws://127.0.0.1:8765/v1", api_key="none", turn_detection=None)
    errors = []
    async with http_context.open():
        session = model.session()
        session.on("error", lambda error: errors.append(str(error.error)))
        session.push_audio(rtc.AudioFrame(speech, 24_000, 1, len(speech) // 2))
        session.commit_audio()
        generation = await session.generate_reply(instructions="which nobody follows")
        message = await anext(generation.message_stream)
        frames = 0
        async for _ in message.audio_stream:
            frames += 1
            if frames == 8:
                break
        session.interrupt()
        session.truncate(message_id=message.message_id, modalities=["audio"], audio_end_ms=HEARD_MS)
        async for _ in message.audio_stream:  # to its end: the response is done
            pass
        session.push_audio(rtc.AudioFrame(speech[:38_400], 24_000, 1, 19_200))
        session.commit_audio()
        generation = await session.generate_reply()
        message = await anext(generation.message_stream)
        await anext(message.audio_stream)
        await session.aclose()
        await model.aclose()
    print(json.dumps({"heard_ms": HEARD_MS, "errors": errors}))


asyncio.run(main())
