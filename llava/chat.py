"""Talk to a LLaVA about pictures.

    python -m llava.chat --model-path checkpoints/ha_dpo --model-base liuhaotian/llava-v1.5-7b --image-file kitchen.jpg
    python -m llava.chat --model-path liuhaotian/llava-v1.5-7b --load-4bit --image-file https://.../view.jpg \
        --query "What are the things I should be cautious about when I visit here?"

Answers appear as they are written. A line ``/image PATH|URL`` adds a picture to the next question, ``/reset`` begins
anew, ``/exit``, an empty line or Ctrl-D ends; Ctrl-C ends an answer that has gone on for too long. Questions may come
from a pipe, a line each.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import DynamicCache, GenerationConfig

from llava.command_line import OneLineParser, quiet
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, template, template_of
from llava.data.images import open_image
from llava.data.supervision import wrap_image_tokens
from llava.distributed import check_device_variables
from llava.errors import UserError, command_line, note
from llava.eval.answer import Answerer
from llava.mm_utils import preprocess_image, tokenizer_image_token
from llava.model.builder import load_as_asked
from llava.model.generation import Sampling, merged_config

COMMANDS = "/image PATH|URL, /reset, /exit, /help"
TIMEOUT = 30  # seconds until a URL must have begun to answer
LARGEST = 50 * 2**20  # bytes of a picture from a URL
UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


def parse_args() -> argparse.Namespace:
    parser = OneLineParser("python -m llava.chat", description="Talk to a LLaVA about pictures.", allow_abbrev=False)
    add = parser.add_argument
    add("--model-path", required=True, help="a whole model, a delta, or several in order: A,B")
    add("--model-base", help="where the model lies that the first delta was trained on")
    add("--image-file", nargs="+", default=[], help="pictures of the first question: paths or URLs")
    add("--query", help="ask this alone, print the answer and end")
    add("--conv-mode", help="conversation template (default: the one the model was trained with)")
    add("--temperature", type=float, default=0.2, help="of sampling (default 0.2, as LLaVA's); 0: the likeliest token")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens that have this share together")
    add("--max-new-tokens", type=int, default=512, help="at most, an answer")
    add("--seed", type=int, default=0, help="of sampling: the same questions get the same answers")
    add("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes)")
    add("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes)")
    add("--device", help="cuda, cuda:1, mps, cpu (default: cuda where there is one)")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16 on CUDA, float32 on the CPU")
    add("--attn_implementation", choices=["sdpa", "eager", "flash_attention_2"])
    add("--debug", action="store_true", help="show every prompt on stderr")
    add("--cache_dir", help="the hub's cache")
    args = parser.parse()
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature:g}: expected 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p:g}: expected more than 0 and at most 1")
    if args.top_p < 1 and args.temperature == 0:
        raise UserError("--top_p chooses what is sampled from, but --temperature 0 samples nothing; leave one out")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
    if args.query is not None and not args.query.strip():
        raise UserError("--query is empty; write a question, or leave it out to talk")
    return args


def load_picture(place: str) -> Image.Image:
    """A picture from a path or an http(s) URL, RGB.

    Raises:
        UserError: it cannot be fetched or opened, and why.
    """
    if not place.startswith(("http://", "https://")):
        return open_image(place, "--image-file")
    try:
        asked = urllib.request.Request(place, headers={"User-Agent": "Mozilla/5.0 (llava.chat)"})
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            content = answer.read(LARGEST + 1)
    except urllib.error.HTTPError as error:
        raise UserError(f"{place}: the server says {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"{place}: cannot be fetched ({getattr(error, 'reason', error)})") from None
    if len(content) > LARGEST:
        raise UserError(f"{place}: larger than {LARGEST >> 20} MB; download it and pass the file")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: no picture ({' '.join(str(error).split())})") from None


@dataclass
class Chat:
    """A conversation with one model: its turns, its pictures, and what the model has computed of them.

    Keys and values of the turns so far are kept, so that a question costs its own tokens; a picture is encoded once.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    template: Conversation
    settings: GenerationConfig  # with the ends of an answer
    stop_text: str | None = None  # the end of an answer that is no token
    seed: int = 0
    debug: bool = False
    turns: list[tuple[str, str]] = field(default_factory=list)  # question with its marks, answer

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)
        self.aspect = getattr(self.model.config, "image_aspect_ratio", None)
        config = merged_config(self.model, self.settings)
        self.model._prepare_special_tokens(config, device=self.model.device)
        self.processors = self.model._get_logits_processor(config, input_ids_seq_length=0, device=self.model.device)
        self.reset()

    def reset(self) -> None:
        """Forget all that was said and shown."""
        self.turns.clear()
        self.features: list[torch.Tensor] = []  # of every picture, (T, D_vision), by the tower
        self.waiting = 0  # pictures that belong to the next question
        self._cache, self._known = DynamicCache(config=self.model.config), []

    @torch.inference_mode()
    def show(self, picture: Image.Image) -> None:
        """Add a picture to the next question."""
        pixels = preprocess_image(picture, self.image_processor, self.aspect)[None]
        self.features.append(self.model.see(pixels.to(self.model.device, self.model.dtype))[0])
        self.waiting += 1

    def prompt(self, question: str) -> str:
        """All turns and the next question, open for its answer; ``question`` has its marks."""
        conversation = self.template.copy()
        for asked, answer in [*self.turns, (question, None)]:
            conversation.append_message(conversation.roles[0], asked)
            conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def ask(self, text: str) -> Iterator[str]:
        """The answer to ``text`` piece by piece; what was given is remembered however the loop over it ends.

        Raises:
            UserError: the conversation has become too long for the model.
        """
        marks = f"{DEFAULT_IMAGE_TOKEN}\n" * self.waiting
        in_marks = bool(getattr(self.model.config, "mm_use_im_start_end", False))
        question = wrap_image_tokens(marks + text.replace(DEFAULT_IMAGE_TOKEN, ""), self.template, in_marks)
        prompt = self.prompt(question)
        if self.debug:
            print(prompt, file=sys.stderr, flush=True)
        ids = tokenizer_image_token(prompt, self.tokenizer)
        room = self._room(ids)
        shown, new = "", []
        self.waiting = 0
        try:
            for token in self._tokens(ids, room):
                new.append(token)
                written, whole = self._text(new)
                if len(written) > len(shown):
                    piece, shown = written[len(shown) :], written
                    yield piece
                if whole:
                    break
            rest = self._text(new, ended=True)[0]
            if len(rest) > len(shown):
                piece, shown = rest[len(shown) :], rest
                yield piece
        finally:
            self.turns.append((question, shown.strip()))

    def _room(self, ids: list[int]) -> int:
        """How many tokens an answer may have."""
        length = len(ids) + sum(len(features) - 1 for features in self.features)
        most = self.model.config.max_position_embeddings
        if length >= most:
            self._cache, self._known = DynamicCache(config=self.model.config), []
            raise UserError(f"the conversation has {length} tokens, the model takes {most}; begin anew with /reset")
        return min(self.settings.max_new_tokens, most - length)

    def _tokens(self, ids: list[int], room: int) -> Iterator[int]:
        """New tokens, without the one that ends the answer."""
        logits = self._read(ids)
        ends = self.settings.eos_token_id or []
        device = self.model.device
        written = torch.empty(1, 0, dtype=torch.long, device=device)
        for _ in range(room):
            scores = self.processors(written, logits)
            if self.settings.do_sample:
                # On the CPU, so that a seed means the same everywhere.
                token = int(torch.multinomial(scores[0].softmax(-1).cpu(), 1, generator=self.draw))
            else:
                token = int(scores[0].argmax())
            if token in ends:
                return
            yield token
            written = torch.cat([written, torch.tensor([[token]], device=device)], dim=1)
            logits = self._forward(torch.tensor([[token]], device=device))
            self._known.append(token)

    def _read(self, ids: list[int]) -> torch.Tensor:
        """Logits (1, V) behind a prompt, of which what is known already is not computed again."""
        numbers = iter(range(len(self.features)))
        symbols = [("picture", next(numbers)) if index == IMAGE_TOKEN_INDEX else index for index in ids]
        same = 0
        if self.model.post_block is None:  # a block looks at pictures only when it first reads the row
            while same < min(len(symbols) - 1, len(self._known)) and symbols[same] == self._known[same]:
                same += 1
        kept = sum(len(self.features[s[1]]) if isinstance(s, tuple) else 1 for s in symbols[:same])
        too_many = self._cache.get_seq_length() - kept
        if same == 0 or too_many < 0:
            self._cache, same = DynamicCache(config=self.model.config), 0
        elif too_many:
            self._cache.crop(-too_many)
        self._known = symbols
        new = [s[1] for s in symbols[same:] if isinstance(s, tuple)]
        pictures = torch.stack([self.features[number] for number in new]) if new else None
        return self._forward(torch.tensor([ids[same:]], device=self.model.device), pictures)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        index = None if features is None else torch.arange(len(features))[None]
        out = self.model(
            input_ids=ids,
            vision_features=features,
            image_index=index,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        return out.logits[:, -1].float()

    def _text(self, new: list[int], ended: bool = False) -> tuple[str, bool]:
        """What of an answer can be shown, and whether it has come to the template's end.

        Held back, unless it has ``ended``: a character that lacks bytes, and what may be the beginning of the end.
        """
        text = self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stop = self.stop_text
        if stop and stop in text:
            return text[: text.index(stop)], True
        if ended:
            return text, False
        text = text.rstrip(UNFINISHED)
        for length in range(min(len(stop or "") - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return text[:-length], False
        return text, False


def open_chat(args: argparse.Namespace) -> Chat:
    """The model that the flags name, ready to talk."""
    check_device_variables()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model, image_processor = load_as_asked(args, device)
    conversation = template(args.conv_mode or template_of(model.config), "--conv-mode")
    # Whose rules about the end of an answer are those of POPE.
    rules = Answerer(model, tokenizer, image_processor, conversation, args.max_new_tokens)
    ends = rules.settings.eos_token_id
    settings = GenerationConfig(
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        top_p=args.top_p if args.temperature else None,
        top_k=Sampling(args.temperature).top_k if args.temperature else None,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=[ends] if isinstance(ends, int) else ends,
        pad_token_id=rules.settings.pad_token_id,
    )
    return Chat(
        model, tokenizer, image_processor, conversation, settings, rules.stop_text, seed=args.seed, debug=args.debug
    )


def say(chat: Chat, question: str) -> None:
    """Ask, and write the answer as it comes; Ctrl-C ends it."""
    try:
        for piece in chat.ask(question):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    sys.stdout.write("\n")
    sys.stdout.flush()


def lines(role: str) -> Iterator[str]:
    """What the user writes, until an empty line, Ctrl-D or Ctrl-C."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # so that lines can be edited

    while True:
        try:
            yield input(f"{role}: ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def obey(chat: Chat, line: str) -> bool:
    """Do what a line with a slash says; False where it ends the conversation.

    Raises:
        UserError: no such command, or a picture that cannot be opened.
    """
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        chat.reset()
        note("begun anew")
    elif command == "/image" and rest.strip():
        chat.show(load_picture(rest.strip()))
    elif command == "/help":
        note(f"{COMMANDS}; an empty line ends")
    else:
        raise UserError(f"{line}: expected one of {COMMANDS}")
    return True


def talk(chat: Chat) -> None:
    """Question and answer, until the user ends it."""
    asking, answering = (role.split("\n")[0].removeprefix("<|im_start|>") or "USER" for role in chat.template.roles)
    for line in lines(asking):
        if not line.strip():
            break
        try:
            if line.startswith("/"):
                if not obey(chat, line):
                    break
                continue
            if sys.stdin.isatty():
                sys.stdout.write(f"{answering}: ")
            say(chat, line)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)


@command_line
def main() -> None:
    args = parse_args()
    quiet()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pictures = [load_picture(place) for place in args.image_file]
    chat = open_chat(args)
    for picture in pictures:
        chat.show(picture)
    if args.query is not None:
        say(chat, args.query)
    else:
        talk(chat)


if __name__ == "__main__":
    main()
