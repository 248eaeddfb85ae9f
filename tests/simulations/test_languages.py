"""Spam in many scripts is found with the tokens and the text networks as they come, on small made-up messages."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from fedveil import Experiment, run
from fedveil.datasets.tokens import tokenise
from fedveil.simulations.attacks.lab.display import lines
from fedveil.simulations.attacks.lab.lab import attack

# a language: what stands between its words, words that any message may have, and words of spam; all made-up texts
LANGUAGES = {
    "Japanese": ("", "今日 明日 会社 仕事 友達 映画 電話 駅 ご飯 天気 週末 パン", "割引券 当選 返金 賞金"),
    "Chinese": ("", "今天 明天 公司 工作 朋友 电影 电话 车站 晚饭 天气 周末 面包", "优惠券 中奖 退款 奖金"),
    "Thai": ("", "วันนี้ พรุ่งนี้ บริษัท ทำงาน เพื่อน หนัง โทรศัพท์ สถานี ข้าวเย็น อากาศ สุดสัปดาห์ ขนมปัง", "คูปอง ลอตเตอรี่ คืนเงิน รางวัล"),
    "Lao": ("", "ມື້ນີ້ ມື້ອື່ນ ບໍລິສັດ ວຽກ ໝູ່ ໜັງ ໂທລະສັບ ສະຖານີ ເຂົ້າແລງ ອາກາດ ເຮືອນ ເຂົ້າຈີ່", "ຄູປອງ ຫວຍ ຄືນເງິນ ລາງວັນ"),
    "Khmer": ("", "ថ្ងៃនេះ ស្អែក ក្រុមហ៊ុន ការងារ មិត្តភក្តិ កុន ទូរស័ព្ទ ស្ថានីយ បាយ អាកាសធាតុ ផ្ទះ នំប៉័ង", "គូប៉ុង ឆ្នោត សងប្រាក់ រង្វាន់"),
    "Burmese": ("", "ဒီနေ့ မနက်ဖြန် ကုမ္ပဏီ အလုပ် သူငယ်ချင်း ရုပ်ရှင် ဖုန်း ဘူတာ ညစာ ရာသီဥတု အိမ် ပေါင်မုန့်", "ကူပွန် ထီ ငွေပြန်အမ်း ဆု"),
    "Hindi": (" ", "आज कल कंपनी काम दोस्त फ़िल्म फोन स्टेशन रोटी मौसम घर दूध", "कूपन लॉटरी वापसी इनाम"),
    "Tamil": (" ", "இன்று நாளை நிறுவனம் வேலை நண்பர் திரைப்படம் தொலைபேசி நிலையம் உணவு வானிலை வீடு பால்", "கூப்பன் லாட்டரி பணம் பரிசு"),
    "Arabic": (" ", "اليَوْم غَدًا شَرِكَة عَمَل صَدِيق فِيلْم هَاتِف مَحَطَّة عَشَاء طَقْس بَيْت خُبْز", "قَسِيمَة يَانَصِيب اسْتِرْدَاد جَائِزَة"),
    "Hebrew": (" ", "הַיּוֹם מָחָר חֶבְרָה עֲבוֹדָה חָבֵר סֶרֶט טֶלֶפוֹן תַּחֲנָה אֲרוּחָה מֶזֶג בַּיִת לֶחֶם", "קוּפּוֹן הַגְרָלָה הֶחְזֵר פְּרָס"),
    "emoji": ("", "👩‍💻 👩‍🍳 👨‍👩‍👧 👍 👍🏽 🏠 🚉 🍞 ❤️ 🇯🇵 🇫🇷 1️⃣", "🎁 💰 👩‍🚀 👍🏿"),
}  # fmt: skip


def messages(language: str, number: int = 700) -> list[tuple[str, str]]:
    """Messages of five to nine words each; every second one is spam, and holds one word of spam."""
    between, plain, telling = LANGUAGES[language]
    rng, made = random.Random(0), []
    for i in range(number):
        words = rng.choices(plain.split(), k=rng.randint(4, 8))
        words.insert(rng.randrange(len(words) + 1), rng.choice((telling if i % 2 else plain).split()))
        made.append(("spam" if i % 2 else "ham", between.join(words)))
    return made


def written(folder: Path, language: str) -> Path:
    """The messages as a CSV file."""
    path = folder / "mail.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *messages(language)])
    return path


def trained(path: Path, preset: str, out: Path) -> float:
    """Accuracy on the part of a file that is held out, with a preset's network."""
    settings = {"data.dataset": "own", "data.path": str(path)}
    found = run(Experiment.preset(preset).override(settings), out=out, plots=False).summary
    return float(found["test_accuracy"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_spam_is_found_in_every_language(tmp_path, language) -> None:
    assert trained(written(tmp_path, language), "sms-mlp", tmp_path / "run") >= 0.95


@pytest.mark.slow
def test_a_network_that_reads_in_order_makes_words_of_letters(tmp_path) -> None:
    assert trained(written(tmp_path, "Thai"), "sms-lstm", tmp_path / "run") >= 0.95


@pytest.mark.parametrize("name", ["ja.csv", "hi.csv"])
def test_the_files_that_failed_before(tmp_path, name) -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "cases" / name
    if not path.is_file():
        pytest.skip(f"needs {path}, which lies beside the checkout")
    assert trained(path, "sms-mlp", tmp_path / "run") >= 0.95


@pytest.mark.parametrize("language", ["Japanese", "Hindi"])
def test_an_attack_reads_the_words_of_every_script_and_shows_the_text_as_it_is_written(tmp_path, language) -> None:
    """The attack knows scripts by nothing but the tokens; what was sent is shown without spaces where it had none."""
    path = written(tmp_path, language)
    settings = {"data.dataset": "own", "data.path": str(path), "training.batch_size": 1, "training.epochs": 1}
    outcome = attack("words", Experiment.preset("sms-mlp").override(settings), trials=4)
    assert outcome.mean()["recall"] == 1.0
    texts = {text for _, text in messages(language)}
    for shown in outcome.shown:
        sent, read = (line.plain for line in lines(outcome.recovers, shown))
        text = sent.removeprefix("  sent   ")
        assert text in texts
        assert set(read.removeprefix("  read   ").split()) == set(tokenise(text))
