"""The compressed cache inside vLLM: a plugin that vLLM finds by itself (docs/vllm.md).

`names.py` alone imports from vLLM; pages.py, codecs.py and reference.py know nothing of it.
"""
