"""Every person, number and address here is invented."""

import pickle
import re
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm_jax.data.prepare import pii
from medllm_jax.data.prepare.pii import Finding, Scanner
from medllm_jax.errors import UserError

SCANNER = Scanner.load()

# (sentence, {pattern: what it finds})
POSITIVE = [
    ("連絡先は taro.yamada@example.co.jp です。", {"email": "taro.yamada@example.co.jp"}),
    ("Write to jane_doe+clinic@mail.example.org.", {"email": "jane_doe+clinic@mail.example.org"}),
    ("メール：ｔａｒｏ＠ｅｘａｍｐｌｅ．ｊｐ", {"email": "ｔａｒｏ＠ｅｘａｍｐｌｅ．ｊｐ"}),
    ("03-1234-5678に電話した。", {"phone": "03-1234-5678"}),
    ("自宅は（０３）１２３４－５６７８。", {"phone": "（０３）１２３４－５６７８"}),
    ("職場は045(123)4567。", {"phone": "045(123)4567"}),
    ("夫の携帯 090ー1234ー5678。", {"phone": "090ー1234ー5678"}),
    ("080 1234 5678 まで", {"phone": "080 1234 5678"}),
    ("娘：０９０１２３４５６７８", {"phone": "０９０１２３４５６７８"}),
    ("+81-90-1234-5678", {"phone": "+81-90-1234-5678"}),
    ("＋81 (0)3 1234 5678", {"phone": "＋81 (0)3 1234 5678"}),
    ("電話：1234-5678", {"phone": "1234-5678"}),
    ("(090) 1234-5678", {"phone": "(090) 1234-5678"}),
    ("TEL 0312345678", {"phone": "0312345678"}),
    ("窓口は0120‐123‐456です", {"phone": "0120‐123‐456"}),
    ("Call (415) 555-0132 after discharge.", {"us_phone": "(415) 555-0132"}),
    ("Phone 415-555-0132.", {"us_phone": "415-555-0132"}),
    ("+1 415-555-0132", {"us_phone": "+1 415-555-0132"}),
    ("SSN 123-45-6789 on file.", {"us_ssn": "123-45-6789"}),
    ("〒123-4567", {"postal_code": "123-4567"}),
    ("郵便番号：１２３４５６７", {"postal_code": "１２３４５６７"}),
    ("123-4567 東京都在住", {"postal_code": "123-4567"}),
    ("東京都千代田区架空町1-2-3に住む。", {"address": "東京都千代田区架空町1-2-3"}),
    ("住所 大阪府大阪市北区仮町１丁目２番３号", {"address": "大阪府大阪市北区仮町１丁目２番３号"}),
    ("横浜市中区仮通一丁目二番地に転居", {"address": "横浜市中区仮通一丁目二番地"}),
    ("千葉県架空郡仮町45番地6", {"address": "千葉県架空郡仮町45番地6"}),
    ("北海道札幌市北区1-2-3 架空荘201号室", {"address": "北海道札幌市北区1-2-3 架空荘201号室"}),
    ("仮沢市見本町12-3-45で倒れた", {"address": "仮沢市見本町12-3-45"}),
    ("保険者番号：06123456", {"insurance_number": "06123456"}),
    ("被保険者番号は0012345678", {"insurance_number": "0012345678"}),
    ("記号・番号：１２３４・５６７８", {"insurance_number": "１２３４・５６７８"}),
    ("記号 1234 番号 567", {"insurance_number": "記号 1234 番号 567"}),
    ("カルテ番号：0012345", {"record_number": "0012345"}),
    ("患者ID 12-3456-7", {"record_number": "12-3456-7"}),
    ("患者番号は１２３４５６。", {"record_number": "１２３４５６"}),
    ("診察券番号：A-00123", {"record_number": "A-00123"}),
    ("カルテNo. 45678", {"record_number": "45678"}),
    ("MRN: 00451278", {"record_number": "00451278"}),
    ("Medical record number 4512-78", {"record_number": "4512-78"}),
    ("Patient ID: AB123456", {"record_number": "AB123456"}),
    ("ID：0012345、入院中", {"record_number": "0012345"}),
    ("マイナンバー：1111 2222 3333", {"my_number": "1111 2222 3333"}),
    ("個人番号は123456789018", {"my_number": "123456789018"}),
    ("提出済み 1234-5678-9018 控え", {"my_number_alone": "1234-5678-9018"}),
    ("１２３４５６７８９０１８", {"my_number_alone": "１２３４５６７８９０１８"}),
    ("旅券番号 TK1234567", {"passport": "TK1234567"}),
    ("Passport No. 123456789", {"passport": "123456789"}),
    ("運転免許証番号：301234567890", {"drivers_licence": "301234567890"}),
    ("Driver's license number D1234567", {"drivers_licence": "D1234567"}),
    ("生年月日：昭和50年1月2日", {"birth_date": "昭和50年1月2日"}),
    ("誕生日は１９７５年１月２日", {"birth_date": "１９７５年１月２日"}),
    ("生年月日 S50.1.2", {"birth_date": "S50.1.2"}),
    ("昭和５０年１月２日生、男性", {"birth_date": "昭和５０年１月２日"}),
    ("1975/1/2生まれの男性", {"birth_date": "1975/1/2"}),
    ("1950年（昭和25年）1月2日生まれ", {"birth_date": "1950年（昭和25年）1月2日"}),
    ("昭和50.1.2生（45歳）", {"birth_date": "昭和50.1.2"}),
    ("平成元年3月生まれ", {"birth_date": "平成元年3月"}),
    ("DOB: 01/02/1975", {"birth_date": "01/02/1975"}),
    ("He was born on January 2, 1975.", {"birth_date": "January 2, 1975"}),
    ("Date of birth: 2 Jan 1975", {"birth_date": "2 Jan 1975"}),
    ("氏名：仮野　太郎", {"name_field": "仮野　太郎"}),
    ("患者氏名: 見本花子（50歳）", {"name_field": "見本花子"}),
    ("氏名　見本太郎　　年齢　50歳", {"name_field": "見本太郎"}),
    ("フリガナ：カリノ タロウ", {"name_field": "カリノ タロウ"}),
    ("Patient: John Sample, 54 years old", {"patient_name": "John Sample"}),
    ("Patient name: Jane Q. Sample", {"patient_name": "Jane Q. Sample"}),
    ("Mr. Sample was admitted.", {"name_title": "Sample"}),
    ("We saw Mrs Anna Sample-Test today.", {"name_title": "Anna Sample-Test"}),
    ("山田様が来院された。", {"name_honorific": "山田"}),
    ("担当の佐々木花子様より", {"name_honorific": "佐々木花子"}),
    ("患者鈴木一郎氏は独居。", {"name_honorific": "鈴木一郎"}),
    ("喜屋武　蒼　様", {"name_honorific": "喜屋武　蒼"}),
    ("田中 太郎 殿", {"name_honorific": "田中 太郎"}),
    ("林様は安静。", {"name_honorific": "林"}),
    ("看護師の鈴木さんに話した。", {"name_san": "鈴木"}),
    ("看護師田中さんが訪室", {"name_san": "田中"}),
    ("スミスさんの血圧", {"name_san": "スミス"}),
    ("花子ちゃんは3歳", {"name_san": "花子"}),
    ("土屋さんと阿部さん", {"name_san": "土屋"}),
    ("一ノ瀬さんと西園寺 薫さん", {"name_san": "一ノ瀬"}),
    ("長谷川先生の外来", {"doctor_name": "長谷川"}),
    ("架空病院　仮野先生御侍史", {"doctor_name": "仮野"}),
    ("内科田中先生に紹介", {"doctor_name": "田中"}),
    ("seen by Dr. Sample on the ward", {"doctor_name": "Sample"}),
]

NEGATIVE = [
    "血圧120-140/70-90mmHg、脈拍72/分。",
    "2020-01-02に入院し、2020/02/03に退院した。",
    "基準値は0.5-1.5 mg/dL、CRP 0.03。",
    "ICD-10はI10、E11.9、C34.1である。",
    "アセトアミノフェン500mgを1日3回、5日分。",
    "文献 123-4567 を参照。",
    "J Med 2019; 381: 1234-1245.",
    "doi:10.1016/j.abc.2020.09.012345",
    "doi 10.1000/09012345678",
    "PMID: 31234567、UMIN000012345、NCT01234567",
    "ISBN 978-4-06-512345-6",
    "JANコード4901234567894",
    "時刻 202001021530 に採血",
    "検体 123456789012 を提出",
    "比は1-1-1-1-1-1とした。",
    "投与量は200-300-400 mgと増量",
    "CAS番号 107-07-3",
    "赤血球450万、白血球12,300、血小板25万。",
    "受容体はα1、β2、5-HT3である。",
    "体重3,012g、身長50.0cm、Apgarスコア8点(1分)、9点(5分)。",
    "同様の症状が多様にみられ、様子をみた。",
    "顔貌は苦悶様で眼瞼結膜は貧血様。",
    "インフルエンザ様症状とヘルペス様の皮疹",
    "水様便、泡沫様の痰、毛様体、皮様嚢腫、芽球様細胞",
    "仕様、模様、神様、有様、異様、一様、皆様、各様式。",
    "関節様の構造と原虫様の小体、金属様光沢。",
    "胃癌様 の所見はない",
    "摂氏38度、華氏100度。",
    "両氏、同氏、某氏、彼氏と氏名。",
    "橋本氏病と山田氏法",
    "大殿筋と臀部、頭殿長、殿部の褥瘡。",
    "患者さんと皆さん、お母さん、お父さん、赤ちゃん。",
    "奥さん、娘さん、息子さん、お子さん、妹さんが付き添った。",
    "看護師さん、お医者さん、薬剤師さん、先生に相談する。",
    "ヘルパーさんとケアマネさん、スタッフさん。",
    "たくさんの妊婦さん、利用者さん、院長さん。",
    "Aさん、○○さん、甲さん、何さん",
    "医者さん、隣さん、大家さん、薬屋さん、運転手さん",
    "担当先生、主治医の先生、外科先生方",
    "校長先生と院長先生に報告",
    "氏名：　　　　生年月日：",
    "氏名：記載なし",
    "薬剤名：アスピリン",
    "氏名、年齢、性別を確認する。",
    "患者番号を確認した。",
    "患者IDと生年月日で照合する。",
    "保険者番号の記載欄",
    "記号を番号に置き換える。",
    "2020年1月2日生検を施行",
    "昭和50年に生化学検査が普及した。",
    "生後3か月、出生体重3,000g、在胎38週2日。",
    "誕生日を祝う。",
    "born at 38 weeks of gestation in 1975",
    "The patient: a 54-year-old man with chest pain.",
    "Patient: Yes, I have a fever.",
    "MR imaging and Ms X were reviewed; mr is lower case.",
    "Dr is a title.",
    "電話で連絡し、携帯を確認。",
    "市販薬を1-2-3日後に中止",
    "東京都在住の50歳の男性。",
    "地区別の12-3群を比較",
    "都市部では1-2割が罹患",
    "消化道、水道水、区域2-3の結節",
    "区分1-2-3、本市の12-3-4群、地区1-2-3",
    "氏名　年齢　性別",
    "担当医師先生、抗うつ薬さん",
    "郵便番号を記入する。",
    "@イマチニブ 400mg",
    "a@b と x@y.1 は宛先でない",
    "パスポートと運転免許証を持参",
    "マイナンバーカードを提示",
    "Patients 1234-5678 were enrolled in 2019-2020.",
    "HLA-DRB1*04:05、rs1234567890",
]


def found(text, scanner=SCANNER):
    return [(finding.pattern, text[finding.start : finding.end]) for finding in scanner.find(text)]


@pytest.mark.parametrize(
    ("text", "expected"), POSITIVE, ids=[f"{n}-{next(iter(e))}" for n, (_, e) in enumerate(POSITIVE)]
)
def test_every_invented_person_is_found(text, expected):
    assert set(expected.items()) <= set(found(text))
    assert {name for name, _ in found(text)} == set(expected)


@pytest.mark.parametrize("text", NEGATIVE)
def test_ordinary_sentences_have_no_findings(text):
    assert found(text) == []


def test_every_shipped_pattern_is_in_the_table():
    assert {name for _, expected in POSITIVE for name in expected} == set(SCANNER.names)
    assert all(SCANNER.labels[name] for name in SCANNER.names)


# What holds for any text

OWN = {"name": "badge", "label": "Badge", "regex": r"B-(?P<digits>\d+)", "mask": "[BADGE]"}


def own(folder, *patterns):
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(list(patterns), allow_unicode=True))
    return file


def without_hints():
    file = Path(pii.__file__).with_name("pii.yaml")
    patterns = [
        {key: value for key, value in entry.items() if key != "hint"} for entry in yaml.safe_load(file.read_text())
    ]
    with tempfile.TemporaryDirectory() as folder:
        return Scanner.load(own(Path(folder), *patterns))


WITHOUT_HINTS = without_hints()

PIECES = st.sampled_from(
    [
        *(text for text, _ in POSITIVE),
        *(text for table in POSITIVE for text in table[1].values()),
        *"0１-－ー（）様氏殿君山田中一の、。：・@.+ \n　aAM",
        *("さん", "患者", "氏名：", "生年月日", "番号", "先生", "Mr. ", "電話", "〒", "東京都", "市", "丁目", "[氏名]"),
    ]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_findings_are_ordered_apart_and_inside_and_masking_touches_nothing_else(text):
    findings = SCANNER.find(text)
    borders = [0, *(place for finding in findings for place in (finding.start, finding.end)), len(text)]
    assert borders == sorted(borders) and all(finding.start < finding.end for finding in findings)
    kept = [text[end:start] for end, start in zip(borders[::2], borders[1::2], strict=True)]
    rest = SCANNER.mask(text, findings)
    for part in kept[:-1]:
        assert rest.startswith(part + "[")
        rest = rest[len(part) :].partition("]")[2]
    assert rest == kept[-1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*(text for text, _ in POSITIVE), *NEGATIVE]), max_size=8).map("、".join))
def test_a_pattern_finds_nothing_where_it_has_masked(text):
    findings = SCANNER.find(text)
    masked = SCANNER.find(SCANNER.mask(text, findings))
    assert not {finding.pattern for finding in findings} & {finding.pattern for finding in masked}


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_lines_are_scanned_each_by_itself(first, second):
    offset = len(first) + 1
    moved = [Finding(name, start + offset, end + offset) for name, start, end in SCANNER.find(second)]
    assert SCANNER.find(f"{first}\n{second}") == SCANNER.find(first) + moved


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_hints_cost_no_finding(text):
    assert SCANNER.find(text) == WITHOUT_HINTS.find(text)


def test_the_longer_of_two_overlapping_findings_wins(tmp_path):
    patterns = {"aab": "aab", "bcdd": "bcdd", "ddee": "ddee", "c": "c"}
    scanner = Scanner.load(
        own(tmp_path, *({"name": n, "label": n, "regex": r, "mask": "*"} for n, r in patterns.items()))
    )
    assert scanner.find("aabcddee c") == [Finding("bcdd", 2, 6), Finding("c", 9, 10)]


@pytest.mark.parametrize("unit", ["0", "様", "1-1-1-", "山田 ", "東京都市町一"])
def test_time_grows_with_the_text_and_not_with_its_square(unit):
    everything = " ".join(text.replace("。", "") for text, _ in POSITIVE)

    def seconds(size):
        text = unit * (size // len(unit.encode())) + everything
        began = time.thread_time()
        SCANNER.find(text)
        return time.thread_time() - began

    # 32 times the text, whose square is 1,024 times as much: between the two is room for a busy machine
    assert seconds(2**19) < 180 * min(seconds(2**14) for _ in range(5))


# Pattern files


def test_files_add_replace_and_turn_off(tmp_path):
    text = "B-12 a@example.org 03-1234-5678"
    scanner = Scanner.load(own(tmp_path, OWN))
    assert found(text, scanner) == [("badge", "B-12"), ("email", "a@example.org"), ("phone", "03-1234-5678")]
    assert scanner.mask(text, scanner.find(text)) == "[BADGE] [メールアドレス] [電話番号]"
    assert scanner.names == (*SCANNER.names, "badge")

    scanner = Scanner.load(own(tmp_path, OWN | {"name": "email", "group": "digits", "except": ["1.*"]}))
    assert found(text + " B-21", scanner) == [("phone", "03-1234-5678"), ("email", "21")]

    scanner = Scanner.load(own(tmp_path, {"name": "email", "enabled": False}))
    assert found(text, scanner) == [("phone", "03-1234-5678")] and "email" not in scanner.names


def test_the_example_in_the_guide_works(tmp_path):
    guide = Path(__file__).parents[3] / "docs" / "personal-data.md"
    example = re.search(r"```yaml\n(.*?)```", guide.read_text(), re.DOTALL)[1]
    (tmp_path / "example.yaml").write_text(example)
    scanner = Scanner.load(tmp_path / "example.yaml")
    assert found("病棟証：A-12345、病棟証 B-00000、仮野先生", scanner) == [("ward_badge", "A-12345")]
    assert all(f"| `{name}` |" in guide.read_text() for name in SCANNER.names)


def test_my_number_needs_its_check_digit():
    numbers = [f"12345678901{digit}" for digit in range(10)]
    assert [number for number in numbers if found(f" {number} ")] == ["123456789018"]


def test_the_fingerprint_is_that_of_the_findings(tmp_path):
    def fingerprint(**changes):
        return Scanner.load(own(tmp_path, OWN | changes)).fingerprint

    assert Scanner.load().fingerprint == SCANNER.fingerprint and re.fullmatch("[0-9a-f]{64}", SCANNER.fingerprint)
    assert fingerprint() == fingerprint(label="Another label") == fingerprint(enabled=True)
    changes = [{}, {"mask": "*"}, {"regex": "B-[0-9]"}, {"group": 1}, {"except": ["B-0"]}, {"check": "my_number"}]
    assert len({SCANNER.fingerprint, *(fingerprint(**change) for change in [*changes, {"enabled": False}])}) == 7


def test_a_scanner_travels_to_other_processes():
    copy = pickle.loads(pickle.dumps(SCANNER))
    assert copy.fingerprint == SCANNER.fingerprint
    assert all(copy.find(text) == SCANNER.find(text) for text, _ in POSITIVE)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("secret", "pattern 1 is not a mapping"),
        (OWN | {"regexp": "a"}, "'badge': unknown key regexp: did you mean regex"),
        (OWN | {"regex": "(a"}, "'badge': regex is not a regular expression of Python: missing"),
        (OWN | {"regex": "a*"}, "'badge': regex matches the empty text"),
        (OWN | {"hint": "a?"}, "'badge': hint matches the empty text"),
        (OWN | {"except": ["[a"]}, r"'badge': except '\[a' is not a regular expression"),
        (OWN | {"except": "a"}, "'badge': except: expected a list of text"),
        (OWN | {"label": ["a"]}, "'badge': label: expected text or null"),
        (OWN | {"mask": ""}, "'badge': mask is empty"),
        ({"name": "badge", "label": "a", "regex": "a"}, "'badge': mask is missing"),
        ({"label": "a", "regex": "a"}, "pattern 1: name is not set"),
        (OWN | {"group": "letters"}, "'badge': group 'letters' is none"),
        (OWN | {"group": 2}, "'badge': group 2 is none"),
        (OWN | {"check": "isbn"}, "'badge': there is no check 'isbn'; there is my_number"),
        (OWN | {"enabled": "no"}, "'badge': enabled: expected true or false"),
        ({"name": "bagde", "enabled": False}, "'bagde' cannot be turned off"),
    ],
)
def test_a_wrong_pattern_is_named(tmp_path, pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        Scanner.load(own(tmp_path, pattern))
    assert str(caught.value).startswith(f"{tmp_path / 'own.yaml'}: pattern ") and "\n" not in str(caught.value)


def test_a_wrong_file_is_named(tmp_path):
    file = tmp_path / "own.yaml"
    with pytest.raises(UserError, match=r"no pattern file at .*own\.yaml"):
        Scanner.load(file)
    for content, message in (("a: 1", "a list of patterns"), ("- [", "not YAML"), ("", "a list of patterns")):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"own\.yaml.*{message}"):
            Scanner.load(file)
    with pytest.raises(UserError, match="'badge' stands twice"):
        Scanner.load(own(tmp_path, OWN, OWN))
