"""pipecat's service: somebody speaks while it plays, it truncates to what was heard, and the next turn is answered."""

import asyncio
import json
import wave

from pipecat.frames.frames import ErrorFrame, InputAudioRawFrame, TTSAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService


class Ears(FrameProcessor):
    def __init__(self) -> None:
        super().__init__()
        self.frames = 0
        self.changed = asyncio.Condition()

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            async with self.changed:
                self.frames += 1
                self.changed.notify_all()
        await self.push_frame(frame, direction)

    async def hear(self, frames: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.frames >= frames)


async def main() -> None:
    audio = events.AudioConfiguration(
        input=events.AudioInput(turn_detection=events.TurnDetection(), transcription=events.InputAudioTranscription()),
        output=events.AudioOutput(voice="marin"),
    )
    llm = OpenAIRealtimeLLMService(
        api_key="none",
        base_url="ws://127.0.0.1:8765/v1/realtime",
        settings=OpenAIRealtimeLLMService.Settings(session_properties=events.SessionProperties(audio=audio)),
    )
    errors, truncated = [], []
    send = llm.send_client_event

    async def sent(event: events.ClientEvent) -> None:
        if isinstance(event, events.ConversationItemTruncateEvent):
            truncated.append(event.audio_end_ms)
        await send(event)

    llm.send_client_event = sent  # only watched
    ears = Ears()
    task = PipelineTask(
        Pipeline([llm, ears]), params=PipelineParams(audio_in_sample_rate=24_000, audio_out_sample_rate=24_000)
    )

    @task.event_handler("on_pipeline_error")
    async def on_error(_: PipelineTask, frame: ErrorFrame) -> None:
        errors.append(frame.error)

    running = asyncio.create_task(PipelineRunner(handle_sigint=False).run(task))
    with wave.open("examples/prompt.wav") as file:
        speech = file.readframes(file.getnframes())

    async def say(pcm: bytes) -> None:
        for at in range(0, len(pcm), 1_920):
            await task.queue_frame(InputAudioRawFrame(pcm[at : at + 1_920], sample_rate=24_000, num_channels=1))
            await asyncio.sleep(0.04)

    await say(speech + bytes(36_000))
    await ears.hear(12)
    await say(speech[:96_000] + bytes(48_000))
    assert truncated, "pipecat did not truncate"
    before = ears.frames
    await ears.hear(before + 2)
    await task.cancel()
    await running
    print(json.dumps({"heard_ms": truncated[0], "errors": errors}))


asyncio.run(main())
