"""The student over HTTP, in OpenAI's protocol.

A request becomes answers (`requests`), which are written together with everybody else's (`service`, `ticket`) and come
back whole or as a stream (`responses`). `guard` stands before all of it, `app` joins the parts, `process` runs them.
"""
