"""Every mistake is one line that helps, exit code 2, and nothing created."""

import copy
import json
import re
import sys
from operator import attrgetter

import pytest
from omegaconf import ListConfig

from qat.cli import arguments, checks, main
from qat.cli.checks import evaluate
from qat.cli.compose import Composer
from qat.errors import ConfigError, QatError
from tests.described import CACHE

MISTAKES = [
    # flags
    ("--multrun", "did you mean --multirun"),
    ("--quant q2a4", "did you mean quant=<value>?); settings are written key=value"),
    ("--lr 1e-3", "did you mean train.lr=<value>"),
    ("--batch-size=4", "did you mean train.batch_size=<value>"),
    ("--experiment quick", "did you mean experiment=<value>"),
    ("-x", "unknown flag -x"),
    ("--help qant", "--help qant: no such group or key (did you mean quant?)"),
    ("--help q2a4", "--help q2a4: no such group or key (it is an option of quant: see --help quant)"),
    ("--cfg jobs", "invalid choice"),
    ("--run -m", "exclude each other"),
    ("--resolve", "only goes with --cfg"),
    ("--config-path nowhere", "no such folder"),
    ("--config-dir nowhere", "no such folder"),
    ("--config-name nothing", "nothing"),
    ("--experimental-rerun x", "--config-path"),
    ("--shell-completion", "install="),
    # keys
    ("trian.lr=1", "unknown key trian.lr (did you mean train.lr?)"),
    ("lr=1", "did you mean train.lr"),
    ("train.lr.x=1", "unknown key train.lr.x"),
    ("modle=tiny", "did you mean model"),
    ("+foo=1", "unknown key foo"),
    ("++train.foo=1", "unknown key train.foo"),
    ("~model", "would delete"),
    ("~train.lr", "would delete"),
    ("train.lr", "write train.lr=<value>"),
    ("help", "did you mean --help?); settings are written key=value"),
    ("train", "did you mean stage=distill"),
    ("evaluate", "did you mean stage=evaluate"),
    ("q2a4", "did you mean quant=q2a4"),
    ("quick", "did you mean experiment=quick"),
    ("quant", "write quant=<value>"),
    ("nothing_like_it", "is no setting; settings are written key=value"),
    ("model@other=tiny", "unknown key model@other"),
    ("hydra.run.dri=x", "dri"),
    # budgets and patterns
    ("quant=budget", "has no size to choose formats for: set quant.megabytes=56, or quant.bits=3.2"),
    ("quant=budget quant.megabytes=9 quant.bits=3", "quant.megabytes and quant.bits are two sizes"),
    ("quant=budget quant.bits=17", "quant.bits=17.0: must be above 0 and at most 16"),
    ("quant.bits=3", "means nothing to quant=q2a4, which names formats: use quant=budget"),
    ("quant.layers=5", "quant.layers takes a mapping: write it in braces"),
    ("quant.layers={*.q_proj:5}", "quant.layers.*.q_proj takes a section in braces"),
    ("quant.layers={*.q_proj:{bits:9,rank:1}}", "quant.layers[*.q_proj].bits=9: must be at least 1 and at most 8"),
    ("quant.layers={*.q_proj:{bits:3}}", "quant.layers[*.q_proj].rank is missing"),
    # options
    ("quant=q2a5", "did you mean q2a4?); quant is one of budget, compressed_w2_g64, "),
    ("quant=Q2A4", "did you mean q2a4"),
    ("model=qwen3_06b", "did you mean qwen3_0_6b"),
    ("model=qwen", "did you mean qwen3_"),
    ("+experiment=sr_01", "did you mean sr_001"),
    ("quant=null", "no such option"),
    ("quant=", "no such option"),
    ("checkpoint=q4_fp31", "did you mean q4_fp32"),
    ("-m quant=q2a4,q2a5", "did you mean q2a4"),
    ("stage=report outputs=nowhere", "outputs=nowhere is not there, so there is nothing to report"),
    # types and syntax
    ("train.steps=abc", "train.steps=abc: expected a whole number"),
    ("train.steps=1.5", "expected a whole number"),
    ("train.lr=fast", "expected a number"),
    ("mode.mlp=perhaps", "expected true or false"),
    ("stage=rum", "expected one of run, cache"),
    ("stage=train", "did you mean distill"),
    ("stage=quantize", "did you mean convert"),
    ("stage=eval", "did you mean evaluate"),
    ("instance.device=cud", "did you mean cuda"),
    ("train=3", "is a section"),
    ("train.steps=null", "train.steps"),
    ("train={stepz:3}", "did you mean train.steps"),
    ("train.lr=[1,", "cannot read train.lr=[1,"),
    (
        "quant.layers={'*.down_proj':{bits:4}}",
        "cannot read quant.layers={'*.down_proj':{bits:4}}: names before a colon stand without quotes",
    ),
    ("quant=budget quant.bits=3 quant.candidates=[]", "quant.candidates=[]: quant.bits has no formats to choose from"),
    ("train.lr=1,2", "add -m"),
    ("train.lr=${nowhere}", "nowhere"),
    ("run.goal=???", "run.goal has no value"),
    ("quant=q2a16 quant.attn.bits=3", "quant.attn is null: quant=q2a16 has none, these do: compressed_w2_g64, "),
    ("first.train.steps=3", "first is null: say first.quant=<option> first.mode=<option> as well, or +experiment=prog"),
    ("first={train:{steps:3}}", "first is null: say first.quant=<option>"),
    ("quant.embed.bits=4", "quant.embed is null: quant=q2a4 has none, these do: gguf_iq4_nl, "),
    ("quant.embed.bits=4", "; or give it whole, 'quant.embed={bits: 4, rank: 8}'"),
    ("stage=evaluate evaluate.fewshot=3", "evaluate.fewshot=3: means nothing without evaluate.tasks, as in evaluate.t"),
    ("stage=evaluate evaluate.stride=9", "evaluate.stride=9: means nothing without evaluate.text"),
    ("mode=lora mode.rank=0", "mode.rank=0: mode=lora trains adapters of some rank"),
    ("quant.layers.up_proj.bits=3", 'names of quant.layers stand in braces, as in "quant.layers={*.down_proj: {bits:'),
    ("quant.layers={*.up_proj:{bit:3,rank:4}}", "unknown key quant.layers.*.up_proj.bit (did you mean bits?)"),
    ("quant.embed={bits:9,rank:8}", "quant.embed.bits=9: must be at least 1 and at most 8"),
    ("quant.embed={bits:4}", "quant.embed.rank is missing: quant.embed.format=codebook needs it"),
    ("quant.mlp.group=64", "quant.mlp.group=64: means nothing to quant.mlp.format=codebook, which has bits, rank"),
    ("quant.mlp.levels=shifted", "which has bits, rank: set quant.mlp.levels=halves"),
    ("quant=g2a4_g64 quant.attn.rank=4", "quant.attn.rank=4: means nothing to quant.attn.format=grid, which has bits"),
    ("quant.mlp.format=grid", "quant.mlp.rank=32: means nothing to quant.mlp.format=grid"),
    ("quant.mlp.format=grid quant.mlp.rank=null", "quant.mlp.group is missing: quant.mlp.format=grid needs it"),
    ("quant.attn.rank=null", "quant.attn.rank is missing: quant.attn.format=codebook needs it"),
    ("first.quant=q4a4 first.mode=e2e first.quant.mlp.group=2", "first.quant.mlp.group=2: means nothing"),
    ("quant.mlp.format=grd", "grid"),
    ("first.quant.mlp.bits=3", "first is null"),
    ("first.quant=q4a4", "first.mode has no option: choose first.mode=<option>"),
    ("first.mode=e2e", "first.quant has no option: choose first.quant=<option>"),
    ("first.quant=q4a5", "did you mean q4a4"),
    ("+experiment=progressive first.quant=q2a16 first.quant.attn.rank=4", "first.quant=q2a16 has none, these do"),
    # values
    ("train.steps=0", "train.steps=0: must be at least 1"),
    ("train.lr=nan", "finite"),
    ("train.steps=1e30", "finite"),
    ("data.thinking=maybe", "false, true or both"),
    ("outputs=", "outputs is empty"),
    ("outputs=taken", "no folder"),
    ("hydra.run.dir=taken/x", "no folder"),
    # combinations
    ("cache.top_k=49153", "only 49152 tokens"),
    ("model=tiny cache.random=1024", "cache.random=1024: model=tiny has only 512"),
    ("model=local", "model.path=<folder>"),
    ("model=local model.path=nowhere", "no config.json, as there is no such folder"),
    ("model=local model.path=folder cache.top_k=200 cache.random=1", "only 100 tokens"),
    ("mode=attn quant=q2a16", "use mode=mlp"),
    ("mode=e2e quant=q2a16", "no format"),
    ("mode=mlp mode.mlp=false", "nothing would learn"),
    ("mode=lora quant=q2a16", "use mode.attn=false"),
    ("mode=lora mode.rank=-1", "mode.rank=-1: must be at least 0"),
    ("mode=lora mode.embed=true", "mode.embed=true: adapters are for layers of the decoder"),
    ("mode=lora train.learn.norms=1", "train.learn.norms=1: with mode.rank=8 adapters learn"),
    ("mode=lora train.learn.latent=4", "train.learn.latent=4: with mode.rank=8 adapters learn"),
    ("+experiment=progressive first.mode=lora", "first.mode.rank=8: the student that is trained first is converted"),
    ("loss=sft", "data=selfgen has text of source selfgen, which has none that are given: use data=chat_jsonl"),
    ("stage=cache loss=sft data=prompts", "data=prompts has text of source selfgen"),
    ("loss=sft loss.hard=1", "loss.hard=1: loss=sft has no teacher"),
    ("loss=sft loss.temperature=2", "loss.temperature=2: loss=sft has no teacher"),
    ("loss=sft cache=local cache.path=imported", "does not say which tokens belong to any"),
    ("data=text", "data.path=<file>"),
    ("data=text data.path=nowhere", "no such file"),
    ("data=text data.path=nowhere/*.txt", "no such file"),
    ("data=text data.path=[broken,nowhere]", "data.path=nowhere: no such file"),
    ("data=text data.path=3", "data.path=3: no such file"),
    ("data=text data.path={a:1}", "must be a file, a glob or a list of them"),
    ("data=mix", "needs its sources"),
    ("data=questions data.parts=[{source:text}]", "only it has any"),
    ("data=mix data.parts=[{source:text}]", "data.parts[0].path=<file>"),
    ("data=mix data.parts=[{source:texts}]", "texts"),
    ("data=mix data.parts=[{source:text,wieght:2}]", "wieght"),
    ("data=mix data.parts=[{source:text,path:broken,weight:0}]", "data.parts[0].weight=0.0: must be above 0"),
    ("data=mix data.parts=[{source:selfgen,thinking:perhaps}]", "data.parts[0].thinking=perhaps: must be"),
    ("data=mix data.parts=[{source:mix}]", "cannot be a part"),
    ("data=mix data.parts=[{source:selfgen,answers:0}]", "data.parts[0].answers=0: must be at least 1"),
    ("data=mix data.parts=[{source:selfgen,temperature:0}]", "data.parts[0].temperature=0.0: must be at least 0.01"),
    ("data=mix data.parts=[{source:selfgen,start:openings}]", "data.parts[0].start=openings needs a file"),
    ("data.path=broken", "data=selfgen is a mixture, and each of its sources has its own: use data=prompts, text"),
    ("data.repo=owner/name", "use data=text, alpaca, chat_jsonl or openings, or say it in data.parts"),
    ("data.start=tokens", "each of its sources has its own: use data=tokens, or say it"),
    ("data=openings", "data.start=openings needs a file: data.path=<file>"),
    ("data=openings data.path=nowhere", "data.path=nowhere: no such file"),
    ("data=questions data.documents=null", "data.start=questions has no end of its own"),
    ("data.start=question", "expected one of prompts, tokens, openings, questions"),
    ("cache.packing=apart", "expected one of joined, rows"),
    ("cache.inspect=true", "goes with stage=cache"),
    ("stage=cache cache.tail=guess", "expected one of exact, estimate"),
    ("cache=local cache.path=older", "use loss=topk_kl"),
    ("stage=distill checkpoint=mlp_only cache=local cache.path=imported", "use loss=topk_kl"),
    ("cache.train_targets=false", "keeps their text alone: use loss=full_kl"),
    ("cache.train_targets=false loss=full_kl loss.hard=0.1", "keeps their text alone"),
    ("cache=local", "cache.path=<folder>"),
    ("cache=local cache.path=nowhere", "no such folder"),
    ("checkpoint=local", "needs a name or a path"),
    ("checkpoint=SR-999", "no such folder or file, no run in outputs, and no registered or pulled name"),
    ("checkpoint=foo", "registered are teacher, q2_0_5341"),
    ("checkpoint=q4_fp23", "(did you mean q4_fp32?); registered are"),
    ("checkpoint=folder", "no manifest.json"),
    ("stage=export", "export.output=<folder>"),
    ("stage=export export=packed export.output=new", "needs a quantized model: checkpoint=<path>"),
    ("stage=export export=anemll_v2 export.dtype=bf16 export.output=new", "is written in fp32 or fp16"),
    ("stage=export export=coreml export.dtype=fp32 export.output=new", "is written in fp16"),
    ("export.context=0", "export.context=0: must be at least 1"),
    ("stage=export export.dtype=int8 export.output=new", "expected one of fp32, bf16, fp16"),
    ("stage=export export.output=folder", "there are other files in it"),
    ("stage=export export.output=taken", "is no folder that can be written to"),
    ("stage=distill checkpoint=folder", "no manifest.json"),
    ("stage=distill", "stage=distill needs a quantized start"),
    ("stage=evaluate checkpoint=broken", "cannot be read"),
    ("stage=distill checkpoint=mlp_only mode=e2e", "use mode=mlp"),
    ("evaluate.against=[teacher]", "goes with stage=evaluate"),
    ("evaluate.text=taken", "goes with stage=evaluate"),
    ("evaluate.tasks=[taken]", "goes with stage=evaluate"),
    ("stage=evaluate evaluate.against=teacher", "write it in brackets, evaluate.against=[one,two]"),
    ("stage=evaluate evaluate.against=[taecher]", "no registered or pulled name (did you mean teacher?)"),
    ("stage=evaluate evaluate.against=[teacher,folder]", "evaluate.against=folder: no manifest.json"),
    ("stage=evaluate evaluate.against=[taken]", "is no checkpoint"),
    ("stage=evaluate evaluate.text=nowhere", "evaluate.text=nowhere: no such file"),
    ("stage=evaluate evaluate.text=folder", "evaluate.text=folder: no such file"),
    ("evaluate.stride=3000", "longer than evaluate.context=2048"),
    ("evaluate.tokens=1", "at least 2"),
    ("store=gcs", "store.path"),
    ("instance.compile=maybe", "auto, true or false"),
    ("instance.checkpointing=1", "auto, true or false"),
    ("instance.devices=1000 train.batch_size=1000", "instance.devices=1000: this computer has"),
    ("model=tiny model.vocab_size=260", "at least 261 and at most 1048576"),
    ("data.documents=0", "data.documents=0: must be at least 1"),
    ("data=mix data.parts=[{source:selfgen,documents:-1}]", "data.parts[0].documents=-1: must be at least 1"),
    ("instance.devices=32", "train.batch_size=16: fewer sequences than instance.devices=32"),
    ("train.learn.scales=0 train.learn.codebooks=0", "nothing would learn"),
    ("run.resume=SR-007", "run.resume=SR-007: no such run in outputs"),
    ("run.resume=../SR-007", "no such run"),
    ("stage=evaluate checkpoint=mlp_only run.resume=SR-007", "only training goes on"),
    ("store=url store.path=bucket", "not a URL"),
    ("store.mirror=true", "needs a store"),
    ("stage=store", "stage=store needs a store"),
    ("stage=pull store=gdrive", "stage=pull needs a name"),
    ("stage=push store=gdrive", "something to push"),
    ("stage=pull store=gdrive store.archive=../x", "a path as stage=store lists it"),
    ("stage=push store=gdrive checkpoint=mlp_only store.archive=a/b", "no folders in it"),
    ("sweep.resume=sweep-007", "name the folder of a sweep"),
    # sweeps
    ("-m train.lr=1e-3,0", "must be above 0"),
    ("-m quant=q2a4,q2a16 mode=mlp,e2e", "no format"),
    ("-m train.steps=range(1,1000000000)", "more than 256 jobs"),
    ("-m train.lr=interval(0,1)", "train.lr=interval(0,1)"),
    ("-m checkpoint=teacher,folder", "checkpoint=folder: no manifest.json"),
]


VALUES = [
    ("seed", -1, "at least 0"),
    ("train.lr", 0.0, "above 0"),
    ("train.lr", -1e-3, "above 0"),
    ("train.lr", float("inf"), "finite"),
    ("train.warmup", 1.5, "at most 1"),
    ("train.batch_size", 0, "at least 1"),
    ("train.grad_clip", 0.0, "above 0"),
    ("train.eval_every", 0, "at least 1"),
    ("quant.mlp.bits", 9, "at least 1 and at most 8"),
    ("quant.attn.bits", 0, "at least 1 and at most 8"),
    ("quant.attn.rank", 0, "at least 1"),
    ("quant.mlp.group", 0, "at least 1"),
    ("data.eval_fraction", 0.0, "above 0 and below 1"),
    ("data.eval_fraction", 1.0, "above 0 and below 1"),
    ("data.answer_tokens", 0, "at least 1"),
    ("convert.rounds", 0, "at least 1"),
    ("instance.micro_batch", 0, "at least 1"),
    ("instance.devices", 0, "at least 1"),
    ("train.learn.latent", -1.0, "at least 0"),
    ("train.save_every", 0, "at least 1"),
    ("train.keep", 0, "at least 1"),
    ("loss.hard", -0.1, "at least 0"),
    ("loss.temperature", 0.0, "at least 0.01 and at most 1000"),
    ("chat.temperature", 1e-300, "0 or at least 0.01"),
    ("loss.temperature", 1e6, "at least 0.01 and at most 1000"),
    ("cache.length", 1, "at least 2"),
    ("cache.sequences", 0, "at least 1"),
]


@pytest.fixture(scope="module")
def valid():
    """The default configuration, to be copied: composing it takes a while."""
    return main.check(arguments.parse([])).configs[0]


@pytest.mark.parametrize(("key", "value", "hint"), VALUES)
def test_value_out_of_range(key, value, hint, valid, here):
    config = copy.deepcopy(valid)
    checks.check(config)
    section, _, name = key.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, value)
    with pytest.raises(ConfigError, match=re.escape(f"{key}={value}: must be ") + ".*" + hint):
        checks.check(config)


@pytest.fixture
def littered(here, checkpoint):
    """A current directory with a few things to stumble over."""
    (here / "taken").write_text("a file")
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text(json.dumps({"vocab_size": 100, "model_type": "llama"}))
    (here / "folder" / "model.safetensors").touch()
    (here / "broken").mkdir()
    (here / "broken" / "manifest.json").write_text("{")
    checkpoint("mlp_only", attn=False)
    (here / "older").mkdir()
    (here / "older" / "shard_00000.pt").write_text("")
    (here / "imported").mkdir()
    (here / "imported" / "manifest.json").write_text(json.dumps(CACHE))
    return here


@pytest.mark.parametrize(("line", "hint"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistake_is_one_helpful_line(line, hint, littered, capfd):
    before = sorted(littered.rglob("*"))
    code = main.main(line.split(), launch=lambda: pytest.fail("launched"))
    told = capfd.readouterr()
    assert code == 2
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1 and told.err.endswith("\n")
    assert hint in told.err
    assert sorted(littered.rglob("*")) == before


def test_mistake_in_a_process(launch_alone, here):
    done = launch_alone("-m", "train.lr=1,0")
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert done.heavy == []
    assert list(here.iterdir()) == []


def test_a_run_to_compare_with_is_guessed_from_those_there(checkpoint, here):
    checkpoint("outputs/SR-001/checkpoints/best")
    checkpoint("outputs/sweep-001/SR-002/checkpoints/best")
    with pytest.raises(ConfigError, match=r"^evaluate.against=SR-02: no such folder .*did you mean SR-002\?"):
        main.check(arguments.parse(["stage=evaluate", "evaluate.against=[SR-001,SR-02]"]))
    main.check(arguments.parse(["stage=evaluate", "evaluate.against=[SR-001,SR-002,teacher]"]))


@pytest.mark.parametrize(
    ("there", "line", "says"),
    [
        (False, "evaluate.tasks=[arc_easy]", "run `pip install -e '.[lm_eval]'`"),
        (True, "evaluate.tasks=[arc_easy,mine.yaml]", "evaluate.tasks=mine.yaml: no such file"),
    ],
)
def test_tasks_need_their_package_and_their_files(there, line, says, here, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: object() if there else None)
    with pytest.raises(QatError, match=re.escape(says)):
        main.check(arguments.parse(["stage=evaluate", line]))


def test_a_signal_in_the_midst_of_it_is_still_one():
    """Wherever it comes while OmegaConf fills a list, which then fails while it puts things back."""
    filling, whole, composer = ListConfig.append.__code__, ListConfig._set_value_impl.__code__, Composer({})

    def stopped_at(line: int) -> bool:
        left = [line]

        def trace(frame, event, _):
            if frame.f_code is not filling or frame.f_back.f_code is not whole:
                return None
            if event == "line":
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            composer.compose([])
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    assert all(stopped_at(line) for line in range(1, 13))
