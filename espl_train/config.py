"""The whole configuration of a run: frozen, validated, and nothing else.

The defaults here are for models from the hub; the bundled one brings its own (`presets/micro.toml`). Values come from,
in this order: defaults, presets, a TOML file, command-line overrides (`--learner.learning_rate 1e-4`). How they are
merged and how a mistake is explained stands in `settings/`; the descriptions here are `--help`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]
LEAST_TWINS = 4      # problems without which a comparison with twins says nothing


class Section(BaseModel):
    """Unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class EnvConfig(Section):
    """What is trained on, and what is tested on."""

    id: str = Field("espl/Conventions-v0", description="environment to train on")
    args: dict[str, Any] = Field({}, description="its keyword arguments; one by one: --env.args.NAME VALUE")
    test_id: str | None = Field(None, description="environment of the final test; default: the test split of `id`")
    test_args: dict[str, Any] = Field({}, description="keyword arguments of `test_id`")
    holdout_from: Split | None = Field(
        None, description="carve train, validation and test out of this one split (for sets that come in one piece)"
    )
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="its share of the problems, beside other environments"
    )


class ModelConfig(Section):
    """The policy that is trained."""

    path: str = Field("micro", description="'micro' (bundled), a folder, or a hub id")
    revision: str | None = Field(None, description="commit, branch or tag on the hub")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the base weights; auto: bfloat16 for half-precision models on a GPU; adapters: float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    threads: int = Field(0, ge=0, description="torch CPU threads; 0 = the cores this process may use")
    templates: str | None = Field(None, description="template set; default: the model card's")


class RolloutConfig(Section):
    """How episodes are played."""

    prompts: Positive = Field(3, description="M: system prompts per iteration")
    problems: Positive = Field(10, description="B: problems per iteration")
    samples: Positive = Field(8, description="N: samples per (prompt, problem)")
    dynamic_rounds: int = Field(
        0, ge=0, description="rounds in which others replace problems without contrast (DAPO's dynamic sampling)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of training samples; the ratios account for it"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="below 1 in mode evolution only: truncation biases the ratios"
    )
    max_new_tokens: Positive = Field(1024, description="per turn")
    max_total_tokens: Positive = Field(4096, description="sampled tokens per episode, all turns together")
    max_turns: Positive = Field(12, description="replies per episode")
    deadline_s: Annotated[float, Field(gt=0)] = Field(600.0, description="seconds per episode")
    concurrency: Positive = Field(1024, description="episodes in flight at once")
    retries: int = Field(2, ge=0, description="fresh tries of an episode whose infrastructure failed")
    max_fault_fraction: Fraction = Field(0.1, description="more faulted episodes than this in a step stop the run")


class SandboxConfig(Section):
    """The boxes in which tools run what the model writes; environments without such tools have none."""

    provider: Literal["docker", "bubblewrap", "unsafe_local"] = Field(
        "docker", description="who makes them; never replaced by a weaker one"
    )
    image: str = Field("python", description="a name under sandboxes/, or 'name:tag'")
    max_live: Positive = Field(64, description="boxes alive at once, and so episodes at once that may need one")
    warm: int = Field(4, ge=0, description="boxes kept ready for the next episode")
    memory_mb: int = Field(256, ge=48, description="of one box")
    cpus: Annotated[float, Field(gt=0)] = Field(1.0, description="of one box")
    call_timeout: Annotated[float, Field(gt=0)] = Field(10.0, description="seconds per call of a tool")
    lease_timeout: Annotated[float, Field(gt=0)] = Field(
        120.0, description="seconds that an episode waits for a box before it counts as faulted"
    )
    max_output: int = Field(4000, ge=200, description="characters of one tool message; the middle is left out")


class EngineConfig(Section):
    """Who samples."""

    kind: Literal["local", "vllm"] = Field(
        "local", description="local: torch, sharing the learner's weights; vllm: for GPUs, with adapters only"
    )
    slots: Positive = Field(256, description="sequences decoded together")
    context: Positive | None = Field(
        None, description="tokens of the longest sequence, prompt and reply together; default: the model's"
    )
    kv_gb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="gigabytes for keys and values; default: a quarter of the memory (vllm: rest of gpu_memory)"
    )
    deterministic: bool = Field(
        True, description="admit requests at reproducible moments: same seed, same bits (vllm: one, on a CPU)"
    )
    replicas: int = Field(
        0, ge=0, description="vllm: engines in Ray actors, one GPU each, beside the learner's; 0: in this process"
    )
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="vllm: share of a GPU for its weights, keys and values; default: 0.5, of a replica's own 0.9"
    )
    compile: bool = Field(
        False, description="local: compile the step of decoding, which takes a minute or more; no gain on CPUs"
    )
    rounding: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="vllm: mean error of log-probabilities that is no fault; default: 0.0001, 0.02 in bfloat16"
    )
    pause: Literal["sleep", "kv", "keep"] = Field(
        "sleep", description="vllm on a GPU, while the learner works: sleep gives all memory back, kv keeps the weights"
    )


class LearnerConfig(Section):
    """How weights learn."""

    mode: Literal["lora", "full"] = Field("lora", description="an adapter on all linear layers, or every weight")
    rank: Positive = Field(32, description="of the adapter")
    alpha: Positive = Field(32, description="the adapter is scaled by alpha / rank")
    learning_rate: Annotated[float, Field(gt=0)] = Field(4e-5, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of Adam")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="of Adam")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled, as in AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the rate falls from the end of the warm-up to the end of the run"
    )
    schedule_floor: Fraction = Field(0.0, description="share of the learning rate that a falling schedule ends at")
    warmup: int = Field(0, ge=0, description="optimiser steps of linear warm-up")
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient norm")
    loss: str = Field(
        "importance_sampling", description="importance_sampling, ppo, cispo or gspo; see learner/losses.py"
    )
    ratio_bounds: tuple[float, float] | None = Field(
        None, description="where the ratio is cut; default: the loss has its own"
    )
    normalise: str = Field("sum", description="see learner/losses.py")
    normalise_constant: Positive = Field(1024, description="tokens per sequence that normalise = 'constant' divides by")
    baseline: str = Field("prompt", description="see learner/advantages.py")
    divide_by_std: bool = Field(False, description="divide advantages by the group's standard deviation (GRPO)")
    overlong: Literal["keep", "penalise", "filter"] = Field(
        "keep", description="replies at the token limits: as any other, DAPO's soft penalty, or not learnt from"
    )
    overlong_buffer: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="`penalise`: the last share of a token limit, in which the penalty grows"
    )
    overlong_penalty: Annotated[float, Field(ge=0)] = Field(1.0, description="`penalise`: what is taken at the limit")
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "none", description="weigh tokens where the sampler's probabilities are not the learner's"
    )
    correction_bounds: tuple[float, float] | None = Field(
        None, description="of that weight; default: the correction has its own"
    )
    kl: Annotated[float, Field(ge=0)] = Field(0.0, description="coefficient of KL(policy ‖ reference)")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k2", description="k1 and k2 have the gradient of that KL (k2 is less noisy), k3 is GRPO's"
    )
    parallel: Literal["auto", "data", "fsdp"] = Field(
        "auto", description="under torchrun: whole weights on every rank, or sharded; auto: sharded where large"
    )
    rank_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="seconds that ranks wait for one another in an update"
    )
    micro_batch_tokens: Positive = Field(16384, description="tokens per forward pass: memory, not the gradient")
    compile: bool = Field(
        False, description="compile the model's layers, which takes minutes; not with sharded weights"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="less memory, a third more work; auto: where a micro-batch would not fit otherwise"
    )


class RatingConfig(Section):
    """How skill is learnt from batches; TrueSkill in the paper's numbers."""

    kind: Literal["trueskill", "openskill", "item_response"] = Field(
        "trueskill", description="what learns: from ranks (the first two), or from every reward; see docs/ratings.md"
    )
    mu: float = Field(25.0, description="mean of the root prompt's rating")
    sigma: float = Field(25 / 3, description="its standard deviation (item_response: of the policy's ability)")
    beta: float = Field(25 / 6, description="noise of one match (item_response: one logit)")
    tau: float = Field(25 / 300, description="uncertainty added before each match (item_response: per iteration)")
    draw_probability: Fraction = Field(0.10, description="of TrueSkill's model of a match")
    ties: Literal["paired", "tolerance"] = Field(
        "paired", description="a draw is: undecided by paired differences, or closer than `tolerance`"
    )
    tolerance: float = Field(0.01, description="difference of mean rewards that is still a draw")
    decisive: Annotated[float, Field(ge=0)] = Field(
        1.0, description="standard errors that a paired difference must exceed to be a win and not a draw"
    )
    inheritance: Literal["conservative", "reference"] = Field(
        "conservative", description="conservative: no crossover child is surer than its surest parent"
    )
    delta_sigma: float = Field(1.0, description="uncertainty that a child adds to its parents'")
    novelty: float = Field(25 / 6, description="item_response: how far children's skills lie from their parents'")
    drift: float = Field(25 / 60, description="item_response: how far the policy's ability moves per iteration")
    difficulty: float = Field(25 / 3, description="item_response: spread of the difficulties of problems")
    interaction: float = Field(25 / 12, description="item_response: how unevenly a prompt helps with problems")


class EvolutionConfig(Section):
    """How system prompts breed."""

    selection: Literal["uniform", "lucb", "ucb", "softmax", "ucb_uniform", "thompson", "pareto"] = Field(
        "lucb", description="who plays; see docs/ratings.md"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="of the softmax selection")
    explore: float = Field(2.0, description="lambda: how many sigmas optimism is worth")
    window: Positive = Field(10, description="K: newest prompts that may play")
    capacity: Positive = Field(100, description="C: prompts that are kept")
    elite: bool = Field(True, description="the best prompt stays a candidate however old it is")
    root_anchor: bool = Field(True, description="the root prompt plays in every batch")
    newest: bool = Field(True, description="the newest prompt plays (uniform, lucb, ucb, pareto)")
    juvenile_games: int = Field(
        0, ge=0, description="a child is sure of a place, the oldest first, until it has played so many games"
    )
    nursery: int = Field(
        0, ge=0, description="nobody is bred while so many children still wait for their first games; 0 = no limit"
    )
    pareto_window: Positive = Field(10, description="iterations that selection = 'pareto' looks back on")
    pareto_scores: Literal["batch", "validation"] = Field(
        "batch", description="pareto: scores of the last batches, or of the validation problems, which all newborn play"
    )
    root: tuple[str, ...] = Field((), description="principles of the root prompt")
    mutate: bool = Field(True, description="breed a mutation child in every iteration")
    parent: Literal["posterior", "batch"] = Field(
        "posterior", description="who mutates: the best rating once this batch counts, or its best mean"
    )
    crossover_probability: Fraction = Field(0.2, description="per iteration")
    migration: Fraction = Field(
        0.0, description="with several environments: per iteration, that one tries a principle that wins in another"
    )
    prune_probability: Fraction = Field(
        0.0, description="per iteration: of playing the best prompt without each of its principles, to drop one"
    )
    immigrant_probability: Fraction = Field(
        0.0, description="per iteration: of a prompt written from the evidence alone, without the principles of others"
    )
    mutations: Positive = Field(1, description="mutation children per iteration, of one parent by different seeds")
    acceptance: Literal["none", "minibatch", "best"] = Field(
        "none", description="who of the written is born: all; who beats its parent in a trial on the batch; the best"
    )
    acceptance_problems: int = Field(0, ge=0, description="of the batch, that a child is tried on; 0 = all of them")
    acceptance_samples: Positive | None = Field(
        None, description="attempts of a child per problem; default: as many as its parent had"
    )
    acceptance_margin: Annotated[float, Field(ge=0)] = Field(
        0.0, description="`minibatch`: standard errors of the paired difference that the lead must exceed"
    )
    writer: Literal["reflection", "placebo"] = Field(
        "reflection", description="placebo: the words that reflection wrote are replaced by random ones (a control)"
    )
    evidence: Literal["real", "shuffled"] = Field(
        "real", description="shuffled: reflection sees the attempts with each other's rewards (a control)"
    )
    max_operations: Positive = Field(2, description="per critique call")
    max_words: Positive = Field(32, description="per principle")
    max_principles: Positive = Field(32, description="per prompt")
    max_prompt_tokens: int = Field(
        0, ge=0, description="of the whole system prompt, as the policy's tokenizer counts it; 0 = no limit"
    )
    evidence_window: int = Field(
        20, ge=0, description="iterations that reflection looks back on; 0 = the last batch of the best prompt"
    )
    cases: Positive = Field(4, description="problems shown in one critique call")
    critiques: Positive = Field(8, description="critique calls per mutation at most")
    attempts: Positive = Field(8, description="attempts shown per problem at most")
    attempt_characters: Positive = Field(12000, description="text of one attempt at most; the middle is left out")
    reflector: Literal["reference", "current", "endpoint"] = Field(
        "reference", description="who reflects: the base model, the one in training, or a server (reflection.base_url)"
    )
    reflection_temperature: Annotated[float, Field(ge=0)] = Field(0.7, description="of reflection calls")
    reflection_max_new_tokens: Positive = Field(2048, description="per reflection call")
    answer_visibility: Literal["none", "verdict", "full"] = Field(
        "verdict", description="what reflection sees: nothing, right or wrong, the answer"
    )
    winner: Literal["posterior", "margin"] = Field(
        "posterior", description="how a problem's winner is found in crossover"
    )
    winner_margin: float = Field(0.01, description="`margin`: mean reward that the winner must be ahead by")
    winner_probability: Fraction = Field(0.8, description="`posterior`: probability of being best")
    canary: bool = Field(
        True, description="plant invented words in what reflection reads, where the templates print them: who copies "
        "them is refused"
    )
    duplicate_similarity: Fraction = Field(
        0.9, description="children whose principles are as alike as that to a known prompt's are refused; 1 = equal "
        "texts only"
    )
    twin_problems: int = Field(
        0, ge=0, description="problems on which prompts that may become the best are compared with renumbered twins; "
        "0 = off"
    )
    twin_margin: Annotated[float, Field(gt=0)] = Field(
        3.0, description="standard errors by which a prompt must be better on seen problems than on twins to be "
        "quarantined"
    )


class ReflectionConfig(Section):
    """Who is asked when prompts breed, how patiently, and what it may cost; see docs/evolution.md."""

    base_url: str | None = Field(
        None, description="of an OpenAI-compatible server, as in http://host:8000/v1, for evolution.reflector endpoint"
    )
    model: str | None = Field(None, description="name of a model on that server")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key; never the key")
    extra: dict[str, Any] = Field({}, description="more fields of a request; one by one: --reflection.extra.NAME VALUE")
    concurrency: Positive = Field(64, description="calls at once")
    deadline_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds per call with all its retries; default: 600 for an endpoint, else none"
    )
    step_deadline_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds for all calls of an iteration: what is late then brings no child; default: none"
    )
    cache: Literal["off", "record", "replay", "replay_only"] = Field(
        "off", description="replies by content: write them, use what is there, or use nothing else"
    )
    cache_dir: str | None = Field(None, description="where they are; default: reflections/ in the run directory")
    max_calls: Positive | None = Field(None, description="calls of the whole run; then it goes on without breeding")
    max_tokens: Positive | None = Field(None, description="the same for tokens, prompts and replies together")
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="the same for the seconds of all calls")
    max_cost: Annotated[float, Field(gt=0)] | None = Field(None, description="the same for money; needs the prices")
    prices: tuple[float, float] | None = Field(
        None, description="money per million prompt tokens and per million sampled tokens, as in 2.5,10"
    )
    currency: str = Field("USD", max_length=8, description="of the prices")
    max_failures: int = Field(
        20, ge=0, description="iterations in a row without any reply (dead server, empty texts) that end a run; 0 = no"
    )
    review: bool = Field(
        False, description="children wait until a person lets them in (espl-train review RUN); short form --review"
    )


class EvaluationConfig(Section):
    """When and how the run looks at tasks that it does not train on."""

    every: int = Field(5, ge=0, description="iterations between validations; 0 = only at start and end")
    problems: Positive = Field(100, description="validation problems at most")
    samples: Positive = Field(1, description="per problem")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0 = greedy")
    prompts: Positive = Field(3, description="top rated prompts that are validated")
    choice: Literal["validation", "lower_bound", "latest"] = Field(
        "validation", description="which prompt is the best one"
    )
    test_problems: Positive = Field(200, description="test problems at most; opened once, at the end")


class Config(Section):
    """One run."""

    mode: Literal["evolution_rl", "rl", "evolution"] = Field(
        "evolution_rl", description="weights and prompts; weights (the root prompt gets all samples); prompts"
    )
    seed: int = Field(0, ge=0, description="of everything that is random")
    steps: Positive = Field(30, description="iterations")
    budget_rollouts: Positive | None = Field(
        None, description="stop after the step that brings training and trials to so many rollouts; steps: at most"
    )
    schedule: Literal["joint", "sequential", "weights_then_prompts", "alternating"] = Field(
        "joint", description="both in every step; prompts, then weights with the best of them; the reverse; by turns"
    )
    schedule_share: Fraction = Field(
        0.5, description="sequential, weights_then_prompts: share of the steps before the turn"
    )
    schedule_period: Positive = Field(5, description="alternating: so many steps for prompts, then as many for weights")
    out: str | None = Field(None, description="run directory; default: runs/<env>-<UTC time>")
    checkpoint_every: Positive = Field(1, description="iterations between checkpoints")
    keep_checkpoints: Positive = Field(3, description="newest checkpoints that are kept")
    overlap: Literal["auto", "on", "off"] = Field(
        "auto", description="reflection while the learner works; auto: on GPUs, where the engine can; same results"
    )
    tensorboard: bool = Field(True, description="write TensorBoard scalars")
    envs: dict[str, EnvConfig] = Field(
        {}, description="several environments by name, in place of [env]: --env A=2 --env B, or --envs.NAME.OPTION"
    )
    env: EnvConfig = EnvConfig()
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    rating: RatingConfig = RatingConfig()
    evolution: EvolutionConfig = EvolutionConfig()
    reflection: ReflectionConfig = ReflectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def environments(self) -> dict[str, EnvConfig]:
        """By name; the only one of a run has the name ""."""
        return self.envs or {"": self.env}

    @property
    def shares(self) -> dict[str, float]:
        """How much of the problems each environment gets; 1 in all."""
        total = sum(env.weight for env in self.environments.values())
        return {name: env.weight / total for name, env in self.environments.items()}

    @property
    def env_ids(self) -> str:
        """What is trained on, in a word or two."""
        return " + ".join(env.id for env in self.environments.values())
