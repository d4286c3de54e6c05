"""The pages keep to the code: what they name is there. Links within the site are `make docs`'s affair."""

import re

import pages

import rmsd
import rmsd.judge
import rmsd.tasks
import rmsd_kernels


def test_the_api_page_documents_all_and_only_what_is_public():
    documented = re.findall(r"^::: ([\w.]+)$", pages.page("docs/api.md"), re.MULTILINE)
    names = [name.rpartition(".")[2] for name in documented]
    public = {*rmsd.__all__, *rmsd_kernels.__all__}
    assert sorted(names) == sorted(public)


def test_tests_that_a_page_or_a_comment_names_exist():
    held = pages.page("docs/reliability.md")
    for file, test in re.findall(r"`(\w+\.py)::(test_\w+?)(?:_\.\.\.)?[`\[]", held):
        assert re.search(rf"def {test}", pages.page(f"tests/{file}")), f"{file} has no {test}"


def test_pages_that_the_code_cites_exist():
    for folder in ("rmsd", "rmsd_kernels", "tests", "benchmarks", "recipes"):
        for path in (pages.ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".yaml", ".cpp", ".h"):
                text = path.read_text(encoding="utf-8")
                for name, section in re.findall(r'docs/([\w/]+\.md)(?:, "([^"]+)")?', text):
                    headings = re.findall(r"^#+ (.*?)(?: \{.*\})?$", pages.page(f"docs/{name}"), re.MULTILINE)
                    assert not section or section in headings, f"{path}: docs/{name} has no section {section!r}"


def test_links_of_the_pages_outside_the_site_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = pages.page(name) if (pages.ROOT / name).exists() else ""
        for target in re.findall(r'(?:\]\(|srcset="|src=")([^)#"]+)', text):
            assert target.startswith("http") or (pages.ROOT / target).exists(), f"{name}: {target}"
