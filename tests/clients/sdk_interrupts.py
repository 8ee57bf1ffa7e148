"""The `openai` package: cancels a response, truncates it to what was heard, and has another."""

import asyncio
import base64
import json
import wave

from openai import AsyncOpenAI

HEARD_MS = 410


async def main() -> None:
    with wave.open("examples/prompt.wav") as file:
        speech = file.readframes(file.getnframes())
    client = AsyncOpenAI(api_key="none", websocket_base_url="ws://127.0.0.1:8765/v1")
    async with client.realtime.connect(model="any") as connection:
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await connection.input_audio_buffer.append(audio=base64.b64encode(speech).decode())
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        deltas, errors, statuses = 0, [], []
        async for event in connection:
            if event.type == "response.output_audio.delta":
                deltas += 1
                if deltas == 8:
                    await connection.response.cancel()
                    await connection.input_audio_buffer.append(audio=base64.b64encode(speech[:38_400]).decode())
                    await connection.conversation.item.truncate(
                        item_id=event.item_id, content_index=0, audio_end_ms=HEARD_MS
                    )
            elif event.type == "conversation.item.truncated":
                await connection.input_audio_buffer.commit()
                await connection.response.create(response={"max_output_tokens": 20})
            elif event.type == "error":
                errors.append(event.error.message)
            elif event.type == "response.done":
                statuses.append(event.response.status)
                if len(statuses) == 2:
                    break
        assert statuses == ["cancelled", "incomplete"], statuses
    print(json.dumps({"heard_ms": HEARD_MS, "errors": errors}))


asyncio.run(main())
