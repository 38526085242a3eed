"""Refusals of transformers' server in OpenAI's form, which OpenAI's clients read.

    {"error": {"message": the reason, "type": "invalid_request_error", "param": null, "code": null}}

transformers answers in FastAPI's form, {"detail": the reason}, and a chat without a template with status 500.
"""

from __future__ import annotations

import traceback
from typing import Any

# Routes that apply the tokenizer's chat template.
CHAT_ROUTES = ("/v1/chat/completions", "/v1/responses")


def answer_errors(app: Any, tokenizer: Any) -> None:
    """Change an app of `transformers serve` in place.

    Args:
        app: a FastAPI application.
        tokenizer: the tokenizer of its model. Without a chat template, the routes that need one answer with status
            400; with one, messages that the template refuses are answered so.
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException
    from transformers import GenerationConfig

    def answer(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": error}, status_code=status)

    @app.exception_handler(HTTPException)  # type: ignore[untyped-decorator]
    async def refused(_request: Any, error: HTTPException) -> JSONResponse:
        told = answer(error.status_code, str(error.detail))
        told.headers.update(error.headers or {})
        return told

    @app.exception_handler(Exception)  # type: ignore[untyped-decorator]
    async def failed(_request: Any, error: Exception) -> JSONResponse:
        return answer(500, f"{type(error).__name__}: {error}")

    @app.exception_handler(ValueError)  # type: ignore[untyped-decorator]
    async def unfit(_request: Any, error: ValueError) -> JSONResponse:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        of_request = raised_in == GenerationConfig.validate.__code__.co_filename
        return answer(400, str(error)) if of_request else await failed(_request, error)

    @app.exception_handler(RequestValidationError)  # type: ignore[untyped-decorator]
    async def unreadable(_request: Any, error: RequestValidationError) -> JSONResponse:
        found = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return answer(422, "; ".join(found))

    @app.exception_handler(TemplateError)  # type: ignore[untyped-decorator]
    async def does_not_fit(_request: Any, error: TemplateError) -> JSONResponse:
        return answer(400, f"messages: the chat template refuses them: {error}")

    @app.middleware("http")  # type: ignore[untyped-decorator]
    async def needs_a_template(request: Any, call_next: Any) -> Any:
        if request.method == "POST" and request.url.path in CHAT_ROUTES and not tokenizer.chat_template:
            return answer(
                400,
                f"{request.url.path} needs a chat template, and the tokenizer of this model has none; send a "
                "prompt to /v1/completions, or add chat_template.jinja to the folder of the checkpoint",
            )
        return await call_next(request)
