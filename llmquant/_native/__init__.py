"""Where the build puts the native library, if there is a compiler; `llmquant/native.py` opens it."""
