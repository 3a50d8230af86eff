"""The prompt language of the webui (AUTOMATIC1111), as pure functions over text.

A prompt is read from the outside in: `tags.py` takes `<lora:…>` out, `composition.py` parts it at AND, `schedule.py`
says what each part is at each step, and `attention.py` what each word of such a text weighs.
"""
