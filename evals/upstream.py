"""Where the benchmarks' own files live: owner, pinned commit, size, sha256, licence. Facts only; no file is shipped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A file of somebody else's. name: path below the data set's folder. sha256: None where nobody has pinned one."""

    dataset: str
    name: str
    url: str
    licence: str
    what: str
    bytes: int | None = None
    sha256: str | None = None
    # Fetched only when asked for by name: large, and many have it already.
    on_request: bool = False


def _github(repository: str, commit: str, licence: str, files: list[tuple]) -> list[Source]:
    """files: (data set, local name, path in the repository, bytes, sha256, what it is)."""
    base = f"https://raw.githubusercontent.com/{repository}/{commit}"
    return [
        Source(dataset, name, f"{base}/{path}", licence, what, size, digest)
        for dataset, name, path, size, digest, what in files
    ]


# No licence in the tree means that nothing is allowed beyond reading: fetched by whoever needs it, never shipped.
NONE_STATED = "none stated by its authors"
# Lists of image ids in repositories whose licence nobody here has looked up: treated as if there were none.
UNCHECKED = "not looked up; fetched, never shipped"

SOURCES: tuple[Source, ...] = (
    *_github(
        "AoiDragon/POPE",
        "08d957b917e5a378a2f99d35b6293c536a66298b",
        "MIT",
        [
            (
                "pope",
                "coco_pope_random.json",
                "output/coco/coco_pope_random.json",
                368166,
                "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
                "POPE on COCO, 3,000 questions",
            ),
            (
                "pope",
                "coco_pope_popular.json",
                "output/coco/coco_pope_popular.json",
                370190,
                "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
                "POPE on COCO, 3,000 questions",
            ),
            (
                "pope",
                "coco_pope_adversarial.json",
                "output/coco/coco_pope_adversarial.json",
                370401,
                "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
                "POPE on COCO, 3,000 questions",
            ),
        ],
    ),
    *_github(
        "AoiDragon/POPE",
        "e3e39262c85a6a83f26cf5094022a782cb0df58d",
        "MIT",
        [
            (
                "pope",
                "coco_pope_random_2910.json",
                "output/coco/coco_pope_random.json",
                360212,
                "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
                "legacy random file, 2,910 questions (LLaVA, OPERA)",
            ),
        ],
    ),
    *_github(
        "DAMO-NLP-SG/VCD",
        "d6568ff81b8fd306a49e630df44f2db5c2300191",
        "Apache-2.0",
        [
            (
                "pope",
                "aokvqa_pope_random.json",
                "experiments/data/POPE/aokvqa/aokvqa_pope_random.json",
                366825,
                "900c244605e8d43626b9579a110e3631e534cddc2aff27fe91e3f080e15d4446",
                "POPE on A-OKVQA, SEEM objects",
            ),
            (
                "pope",
                "aokvqa_pope_popular.json",
                "experiments/data/POPE/aokvqa/aokvqa_pope_popular.json",
                363595,
                "792d586a875c197362256b25e9252cc97df6fa1dca5aca72a53eba560414d6b7",
                "POPE on A-OKVQA, SEEM objects",
            ),
            (
                "pope",
                "aokvqa_pope_adversarial.json",
                "experiments/data/POPE/aokvqa/aokvqa_pope_adversarial.json",
                365037,
                "87f9acb460fcb690f9120c6d69eb05cfedadab5af5eb385b5201fd48bfc6670c",
                "POPE on A-OKVQA, SEEM objects",
            ),
            (
                "pope",
                "gqa_pope_random.json",
                "experiments/data/POPE/gqa/gqa_pope_random.json",
                312270,
                "1c1117ce33df2eae0d7b04827896caff1f79dac7b99b9e1b0c87a415066cff98",
                "POPE on GQA, SEEM objects",
            ),
            (
                "pope",
                "gqa_pope_popular.json",
                "experiments/data/POPE/gqa/gqa_pope_popular.json",
                309332,
                "e48e138bd61dd3bc4ec35cc8d4357b4dbfc68f0e704283a92217325585a17653",
                "POPE on GQA, SEEM objects",
            ),
            (
                "pope",
                "gqa_pope_adversarial.json",
                "experiments/data/POPE/gqa/gqa_pope_adversarial.json",
                310784,
                "64a3bdeb8d24c02d175eafa5e1b24bc7fd611efa95bb87a031c880e548aef094",
                "POPE on GQA, SEEM objects",
            ),
        ],
    ),
    *_github(
        "LisaAnne/Hallucination",
        "6e4d33c4bedf6dfcd24c61bf527f40714717be47",
        "BSD-2-Clause (README)",
        [
            (
                "chair",
                "synonyms.txt",
                "data/synonyms.txt",
                3577,
                "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2",
                "CHAIR synonym table",
            ),
        ],
    ),
    *_github(
        "sangminwoo/RITUAL",
        "52065a663927bff2da370837f0290343dc14a643",
        "MIT (questions: research use)",
        [
            (
                "mme",
                "mme_hallucination.jsonl",
                "experiments/data/MME_Benchmark_release_version/mme_hallucination.jsonl",
                49472,
                "2ac54845262359db1531534d65ec8befe2d41077182242146ba8a6fb381a05f4",
                "MME hallucination subset, 240 questions",
            ),
        ],
    ),
    *_github(
        "junyangwang0410/AMBER",
        "534babf6bbfcce2e735c26289dedfb21cef3c939",
        "Apache-2.0",
        [
            (
                "amber",
                "annotations.json",
                "data/annotations.json",
                1813301,
                "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797",
                "what each image contains and lacks",
            ),
            (
                "amber",
                "relation.json",
                "data/relation.json",
                12699,
                "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e",
                "words that stand for each other",
            ),
            (
                "amber",
                "safe_words.txt",
                "data/safe_words.txt",
                57,
                "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043",
                "words never held against a description",
            ),
            (
                "amber",
                "metrics.txt",
                "data/metrics.txt",
                899,
                "2fbe2ee584d10e7ce0a568a4902d3d2296727d45f761bf091dd35c4e4b5bc6ac",
                "counters of the official scorer",
            ),
            (
                "amber",
                "query/query_generative.json",
                "data/query/query_generative.json",
                106220,
                "b7e4c36596126ee36d2c3922638b7fa98743c26efda78fea2315f4425258d087",
                "1,004 descriptions to ask for",
            ),
            (
                "amber",
                "query/query_discriminative.json",
                "data/query/query_discriminative.json",
                1738529,
                "1502887ac020f4bb7ea564af4e37bddcb030d61b78490d00f9da492a2307abb8",
                "14,216 yes/no questions",
            ),
            (
                "amber",
                "query/query_all.json",
                "data/query/query_all.json",
                1844750,
                "127680ae61f7d4a92d2f7f07a8deaec07f0689b194d2c7c0f41ead7bd2c5bcf5",
                "both kinds of questions",
            ),
        ],
    ),
    *_github(
        "tianyi-lab/HallusionBench",
        "744007c232c292942c7f80eb61edb2465482da31",
        "BSD-3-Clause",
        [
            (
                "hallusionbench",
                "HallusionBench.json",
                "HallusionBench.json",
                431987,
                "ca6e0fb677dd56e5fb0e2700d06c58d01f8a6ae66e0f1773b2ac48c0a095d051",
                "HallusionBench questions",
            ),
        ],
    ),
    *_github(
        "shikiw/OPERA",
        "61426efe4e2e53207f32d9112a86ba5f8364d1d9",
        "MIT",
        [
            (
                "opera-captions",
                "llava-1.5/greedy.jsonl",
                "log/chair_eval_results/llava-1.5/greedy.jsonl",
                259599,
                "3d70bbefa95f1894a09e97e83f2a40531be39b12db50f4e2386c5bfc99842fdd",
                "500 captions of llava-1.5, greedy",
            ),
            (
                "opera-captions",
                "llava-1.5/ours.jsonl",
                "log/chair_eval_results/llava-1.5/ours.jsonl",
                249972,
                "63742c6032d28cfd0396afc24003900cef1aaf270ffef3f5ba3e10aaa7cde318",
                "500 captions of llava-1.5, OPERA",
            ),
            (
                "opera-captions",
                "instructblip/greedy.jsonl",
                "log/chair_eval_results/instructblip/greedy.jsonl",
                332619,
                "b8885a2c69c974232076f0cbc4f7693358d5a340e126540f8a38a38ed7c79588",
                "500 captions of instructblip, greedy",
            ),
            (
                "opera-captions",
                "instructblip/ours.jsonl",
                "log/chair_eval_results/instructblip/ours.jsonl",
                249114,
                "b4b4287c1e8c01f83f6cfae1268edbf71d7201821637587c0b66b9d653dc064a",
                "500 captions of instructblip, OPERA",
            ),
            (
                "opera-captions",
                "minigpt4/greedy.jsonl",
                "log/chair_eval_results/minigpt4/greedy.jsonl",
                216771,
                "e76ff7a33dc60da4e514623b44e7abe7dc7de269afd8400e23ef19eaa962dd00",
                "500 captions of minigpt4, greedy",
            ),
            (
                "opera-captions",
                "minigpt4/ours.jsonl",
                "log/chair_eval_results/minigpt4/ours.jsonl",
                167490,
                "320417cb9525ddab6a2cf3d9e3460e200c0a7271f5e1352dd9275b0be6698c6d",
                "500 captions of minigpt4, OPERA",
            ),
            (
                "opera-captions",
                "shikra/greedy.jsonl",
                "log/chair_eval_results/shikra/greedy.jsonl",
                274452,
                "3de98f2257a7b06808702cbc843a66e1fbebcb21a4e06adacaabab1ae0ddf1b8",
                "500 captions of shikra, greedy",
            ),
            (
                "opera-captions",
                "shikra/ours.jsonl",
                "log/chair_eval_results/shikra/ours.jsonl",
                207744,
                "b21311809ac4bde55bc9a3bf73dbc7605b2d8c0ef5b603be304ab347ae01eb5d",
                "500 captions of shikra, OPERA",
            ),
        ],
    ),
    *_github(
        "xlchen0205/MoD",
        "9afddc27e8161f3cdb5a60d3776991013ce5d0af",
        UNCHECKED,
        [
            (
                "chair-lists",
                "mod.jsonl",
                "experiments/CHAIR/data/chair_500.jsonl",
                60390,
                "d4002b206d2439d96c5955172551ee1129e179f17898f7248b8743ee98dbe32a",
                "list of 500 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "Lackel/AGLA",
        "efa126347c41631152a70d7db0a6ac0708bd9d00",
        UNCHECKED,
        [
            (
                "chair-lists",
                "agla.jsonl",
                "data/CHAIR/chair.jsonl",
                13289,
                "55a3883f5d779b4d0771d414c1ac52839e7ace12d2675e3eb0b20265bc337685",
                "list of 100 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "mehrdadfazli/AssessHalVLM",
        "ccf730c8465af0d24dd22bd14142fe2348d0015f",
        UNCHECKED,
        [
            (
                "chair-lists",
                "assesshal.jsonl",
                "data/chair_500.jsonl",
                66890,
                "1db53a09ef5d10a15d2fcc01b1222839cf9e396ff13cd0f8437f108582a1bd80",
                "list of 500 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "ZhangqiJiang07/middle_layers_indicating_hallucinations",
        "a0622a9dfcd10428f5bcdbf992105fff49c2ec85",
        UNCHECKED,
        [
            (
                "chair-lists",
                "middle-layers.jsonl",
                "log/llava-1.5/chair_eval_500images_tokens_512.jsonl",
                263594,
                "126bcb2d6fdb359a62c4188dff161f9698e79fbfb95218d01c7edc4327b524a1",
                "list of 500 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "coder-gx/DAMRO",
        "03008aca2d9ef5d36ff8583a25c3d33ef1cd8146",
        UNCHECKED,
        [
            (
                "chair-lists",
                "damro.jsonl",
                "data/chair/coco_pope_random.jsonl",
                31421,
                "f2394faa008642664c9269a45d66f620ba9209f847cd0f3894f87c1af89aaa49",
                "list of 500 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "Linxi-ZHAO/MARINE",
        "13b91b958ea2a7af303263d47b2a8144ec335d7f",
        UNCHECKED,
        [
            (
                "chair-lists",
                "marine.json",
                "data/org_qa/chair/coco_chair.json",
                129316,
                "5e832102f9f6ada6a1148e94d2baca0b7d81764252e051b177591e8517ce5ae6",
                "list of 500 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "BillChan226/HALC",
        "12ea8b5a3039d19bad3b58e648419d1b480a6714",
        UNCHECKED,
        [
            (
                "chair-lists",
                "human.txt",
                "eval/chair_metrics/data/human_scores/imageIDs.txt",
                3407,
                "cf1c4eec60f8bf99f75014aad95315361048852c38482b2a51a063034c3c1fed",
                "list of 500 images, or captions about them",
            ),
        ],
    ),
    *_github(
        "YanNeu/RePOPE",
        "bcf22e5690d587cce34e1728af3efdcfaf747d29",
        NONE_STATED,
        [
            (
                "repope",
                "coco_repope_random.json",
                "annotations/coco_repope_random.json",
                340368,
                "f464fcaf60b24ce2f280cf33f122e000dbdd35c8e88f77c4141c9c2cba864611",
                "RePOPE, 2,774 corrected labels of POPE's random questions",
            ),
            (
                "repope",
                "coco_repope_popular.json",
                "annotations/coco_repope_popular.json",
                333773,
                "57832b055bae5fd6176278a4f104c98ddd84811f7d26dfcb93d481f6c9da09a5",
                "RePOPE, 2,727 corrected labels of POPE's popular questions",
            ),
            (
                "repope",
                "coco_repope_adversarial.json",
                "annotations/coco_repope_adversarial.json",
                328764,
                "8c346dbb060bf422ff92e769fa68e5ab3e8a777cb28a26e973387441e05c9ccf",
                "RePOPE, 2,684 corrected labels of POPE's adversarial questions",
            ),
        ],
    ),
    *_github(
        "YanNeu/DASH-B",
        "1538d01da15ef152dca8a8405da3f9444e26661d",
        NONE_STATED,
        [
            (
                "dash-b",
                "dash_benchmark_neg.json",
                "images/dash_benchmark_neg.json",
                42487,
                "29d9afa611083f3becdc64e4c30a1783a6c8be9bf6d335a12b124c50ad2876ed",
                "DASH-B, 1,341 images without their object",
            ),
            (
                "dash-b",
                "dash_benchmark_pos.json",
                "images/dash_benchmark_pos.json",
                32227,
                "fe261c2b9463e27034aea34368330ae4645cfd3bc0feca907240eb5160517829",
                "DASH-B, 1,341 images with their object",
            ),
        ],
    ),
    *_github(
        "postech-ami/BEAF",
        "1975f333c5388caf2704b71a6a3ed9da284536d9",
        NONE_STATED,
        [
            (
                "beaf",
                "beaf_qna.json",
                "beaf_qna.json",
                4100352,
                "150969ea7ee182ea87ff1122b6f4dd1722fc77e868f16fdc4e2fe9fd2539360d",
                "BEAF, version 0, 26,118 questions",
            ),
        ],
    ),
    Source(
        "coco",
        "annotations_trainval2014.zip",
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        "CC-BY-4.0 (annotations)",
        "COCO 2014 instances and captions; no checksum is pinned",
    ),
    Source(
        "coco",
        "val2014.zip",
        "http://images.cocodataset.org/zips/val2014.zip",
        "Flickr terms (images)",
        "COCO val2014 images, about 6 GB; no checksum is pinned",
        on_request=True,
    ),
)

# What cannot be fetched: the owner hands it out, or a person must agree to something first.
NOTES = {
    "mme": "MME's images and the other ten tasks are given out by its authors on request (github.com/BradyFU/"
    "Awesome-Multimodal-Large-Language-Models, branch Evaluation); put a folder per task under mme/.",
    "amber": "AMBER's 1,004 images are linked from github.com/junyangwang0410/AMBER; put them under amber/image/.",
    "pope": "POPE on COCO asks about val2014 images (data get coco --images); A-OKVQA shares them, GQA has its own.",
    "hallusionbench": "HallusionBench's figures are linked from github.com/tianyi-lab/HallusionBench; put VD/ and VS/ "
    "under hallusionbench/.",
    "repope": "RePOPE's labels are used beside POPE's by every POPE table once they are here; the images are POPE's.",
    "dash-b": "DASH-B's images are linked from github.com/YanNeu/DASH-B; put neg/ and pos/ into one folder and name it "
    "with --images.",
    "beaf": "BEAF's images are linked from github.com/postech-ami/BEAF. Its version 1 (26,064 questions) is read as well.",
    "naturalbench": "NaturalBench is on the hub as BaiqiL/NaturalBench: save its groups as JSON lines and its images as "
    "GROUP_0.jpg and GROUP_1.jpg.",
    "mmvp": "MMVP is on the hub as MMVP/MMVP (Questions.csv and the folder MMVP Images).",
    "mmstar": "MMStar is on the hub as Lin-Chen/MMStar: save its split val as a sheet and its images as INDEX.jpg.",
    "r-bench": "R-Bench's files are linked from github.com/mrwu-mac/R-Bench; put image-level_filterd.json and the lists "
    "image-level_ids_1.json to _5 into one folder. The images are Open Images v4, validation.",
    "chair": "CHAIR also needs what each image contains: data get coco, then data objects.",
}

# Those with notes alone have nothing to fetch: their notes say where to ask.
DATASETS = tuple(dict.fromkeys([*(source.dataset for source in SOURCES), *NOTES]))


def sources(dataset: str) -> list[Source]:
    """The files of a data set, in order."""
    return [source for source in SOURCES if source.dataset == dataset]
