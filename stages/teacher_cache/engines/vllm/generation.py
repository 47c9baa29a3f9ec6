"""The teacher as an author: vLLM generates its responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.errors import StageError
from stages.teacher_cache.engines.vllm.process import InProcessVllm
from stages.teacher_cache.settings import RespondSettings, TeacherSettings


class VllmAuthor(InProcessVllm):
    """An Author."""

    def __init__(self, folder: Path, teacher: TeacherSettings, settings: RespondSettings, end_token_id: int) -> None:
        super().__init__(folder, teacher)
        self._settings, self._end = settings, end_token_id

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """See Author. A prompt that leaves no room in the teacher's context gets no response."""
        self.start()
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rooms = [min(self._settings.max_new_tokens, self._teacher.max_model_len - len(prompt)) for prompt in prompts]
        if max(rooms) < 1:
            raise StageError(
                f"no prompt leaves room for a response in {self._teacher.max_model_len} tokens",
                hint="raise teacher.max_model_len",
            )
        asked = [index for index, room in enumerate(rooms) if room > 0]
        params = [
            SamplingParams(
                max_tokens=rooms[index],
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                seed=seed + index,
                stop_token_ids=[self._end],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for index in asked
        ]
        responses: list[list[int]] = [[] for _ in prompts]
        for index, output in zip(asked, self._answers([prompts[i] for i in asked], params), strict=True):
            responses[index] = list(output.outputs[0].token_ids)
        return responses

    def _options(self) -> dict[str, Any]:
        return {"skip_tokenizer_init": True, "enforce_eager": True}
