"""Descriptions of programs, which `--help` shows. This module imports nothing."""

PREDICT = """Classify videos.

An input is a file, an http or https URL, `-` (the video is read from the standard input), a folder
(all videos below it) or a quoted pattern (`'clips/**/*.mp4'`), which this program expands instead
of the shell. --window and --stride classify sliding windows of one long video.

Preprocessing and the number of views come from the model card. A trained model has those of its
evaluation during training; a converted model has those of the released protocol. Predictions equal
those of --mode eval with the same settings. --clips and --crops set a different number of views;
fewer views are faster.

Exit codes:
  0  all inputs were classified
  2  nothing was classified, or an output cannot be written, because an option, the model folder or
     the input as a whole is bad; the last line of stderr is `error: ...`
  3  some inputs failed, each with a line `failed: ...` on stderr, whose last line is
     `N of M failed`; the other inputs were classified
"""

VISUALIZE = """Visualise attention.

The output shows the frames of one clip with their attention rollout (Abnar & Zuidema, "Quantifying
Attention Flow in Transformers", ACL 2020, arXiv:2005.00928). A heat map over each frame shows how
much attention its patches receive, and bars show how much attention each frame receives. With the
suffix .png, FILE is a contact sheet; with .mp4, it is a slide show.

Frames are shown uncropped and upright, and darkened outside the network's crop. The colour scale
starts at the uniform share, 1 / (number of patches per frame). It ends at the share of the
strongest patch in the clip, or at twice the uniform share if that is higher. Rollout follows
attention only and ignores values and MLPs: it shows where a network looks, not why it decides.

In some networks (XViT), attention within a frame also reads keys and values of other frames. The
rollout assigns all attention to the frame's own patches, so that the heat map is approximate in
time.
"""

SERVE = """Serve models over HTTP: a page to try them with videos or a webcam, and an API.

The first line on stdout has the URL of the page. docs/serving.md and, as OpenAPI document,
/openapi.json describe the API. Preprocessing and the number of views come from the model card, so
that predictions equal those of `jaxvid predict`.

Videos are decoded in separate processes with limits of time and memory. The views of concurrent
requests are batched.

After Ctrl-C or SIGTERM, the server accepts no more requests, completes those in progress and exits.
A second signal ends it at once.

Exit codes: 0: stopped by a signal, all requests completed; 2: invalid input, or the port is in use;
130, 143: ended before all requests were completed.
"""

EXPORT = """Export a model folder.

`stablehlo` (default): the network with weights and normalisation as one program, for CPU and CUDA
and any batch size. Running it requires jax and flatbuffers, but not jaxvid.
`onnx`: the same as an ONNX model, for ONNX Runtime, OpenVINO and TensorRT. It outputs logits and
probabilities. Writing it requires pip install 'jaxvid[onnx]'. --precision float16 halves the size;
it is meant for GPUs. --precision int8 computes most matrix products in int8, with scales that are
measured on the videos of --calibrate. Measure its accuracy with jaxvid eval --onnx FILE.
`safetensors`: only the weights, under the same names as in model folders, with `model.json` as
metadata.
FILE.json describes the contents of FILE, how to load it, and for how long a program is guaranteed
to load. `--check FILE` checks that FILE is unchanged and still usable with the installed packages.
It runs a program on one clip and compares the logits with those in FILE.json. It compares names and
shapes of weights with those of this version of jaxvid.

Exit codes: 0 success, 2 invalid input or a failed check.
"""

CONVERT = """Convert released PyTorch weights into a model folder.

The file is a checkpoint of the original implementation, or an image ViT of timm (.pth,
.safetensors) or Google (.npz) whose weights initialise a video model. Nothing is written unless
every key of the file is used once or ignored for a stated reason, and every weight of the model is
filled once or listed as newly initialised.
"""

PREPARE = """Convert videos to a pack, a data set of JPEG frames with fast random access.

The same command resumes an interrupted run. The pack is bit-identical to that of an uninterrupted
run. With `--shard 0/8` to `--shard 7/8`, eight jobs share the work, and the last job to finish
completes the pack.

Exit codes: 0 success, 2 invalid input, 3 some videos are broken.
"""

CHECK = """Decode every frame of every video of a data set, and report broken and unusual videos.

The same command continues an interrupted check.

Exit codes: 0 all videos can be read, 2 invalid input, 3 some videos are broken.
"""

CHECK_LABELS = """Check the order of a model's class names on a few labelled videos.

--videos names class folders, a data folder, an official list of Kinetics or Something-Something, or
a list with lines `path,class name`. The accuracy of the model is printed for each known order of
the names: the order in the model card, alphabetical orders, the official order, and the orders of
the --labels files. To apply another order, write it with --output and convert the weights again
with --labels.

Exit codes: 0: the stored order is plausible; 2: invalid input; 3: another order fits better, or the
model has no class names; 4: nothing can be concluded, or no known order fits.
"""

COMPARE = """Compare two finished evaluations, on the videos that both have.

It prints the overall accuracies, the accuracies of the classes that changed most, and the videos
that became correct or wrong. McNemar's exact test shows whether the difference of the top-1
accuracies is significant (5 % level). BEFORE and AFTER are eval.json files, or the folders that
contain them. The eval_videos.csv in the same folder is also read.
"""

FEATURES = """Extract features of videos: one vector per video or per window, without fine-tuning.

INPUT is a folder of videos, class folders, a data folder, a list, a pack or a video file. Videos in
class folders, lists and packs have labels, which are written with the features. The features are
the input of the network's last layers (--layer video: `features["video"]` in Python; --layer
frames: `features["frames"]`, with one vector per frame of the clip). The features of all clips and
crops of a video are averaged. The numbers of clips and crops come from the model card.

The suffix of FILE is its format: .npz (NumPy), .parquet (needs pyarrow) or .zarr (needs zarr). It
contains the features, ids, labels, names of the classes, and, with --window, the times of the
windows. Videos that cannot be decoded are left out and listed in FILE.

All devices of all processes share the work. Run the same command to continue an interrupted
extraction; the file is then bit-identical to that of an uninterrupted one.

Exit codes: 0: done; 2: invalid input; 3: some videos could not be decoded.
"""

PROBE = """Measure how well features distinguish classes, without training the network.

A linear classifier (logistic regression) and k-nearest-neighbour classifiers are fitted to the
features of TRAIN and evaluated on those of VAL. `jaxvid features` writes both files; the model must
be the same. Without VAL, --val_share holds out a part of TRAIN.

The features of the linear classifier are standardised. Its regularisation C is chosen on a fifth of
the training videos; then it is fitted to all of them. Neighbours are compared by cosine similarity
s and weighted by exp(s / 0.07). The probabilities of the windows of a video are averaged. Features
of frames are averaged over the frames. The same command gives the same result.

It needs the package scikit-learn.
"""

DOWNLOAD = """Download weights, convert them and print the model folder in the cache.

Other programs do the same when --model is the name of a network, a URL or a file; this program does
it in advance, e.g. on a machine that shares its home folder with machines that have no network.

The cache is $JAXVID_CACHE, by default ~/.cache/jaxvid. Files in the folder $JAXVID_WEIGHTS are used
instead of downloading them. An interrupted download continues when the command is run again.
"""

MODELS = """List the networks that can be created by name.

Columns: frames and pixels of a clip, number of classes, parameters, multiply-adds of one view,
published top-1 / top-5 accuracy with the number of clips and crops, and a link to the licence of
the weights that the authors released.
"""

COMPLETION = """Print a completion script for a shell.

bash    eval "$(jaxvid completion bash)"            in ~/.bashrc
zsh     eval "$(jaxvid completion zsh)"             in ~/.zshrc
fish    jaxvid completion fish | source             in ~/.config/fish/config.fish

It completes commands, their options, config names after --config, and files.
"""
