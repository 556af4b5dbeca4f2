"""``python -m llava.serve.cli``: LLaVA's name of ``python -m llava.chat``."""

from llava.chat import main

if __name__ == "__main__":
    main()
